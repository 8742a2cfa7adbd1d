"""Stage one: images go once through a frozen network and their features are kept. `extract.extract` is its one screen."""
