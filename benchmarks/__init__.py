"""What featurepipe promises, measured: each benchmark runs beside what a user would write instead."""
