"""Finds words that must not come back, such as ``duels`` for one-vs-one: ``tools/check_words.py``; exit code 1 if there are any.

One thing has one word, that of the field (CONTRIBUTING.md, Style). A word is looked for in all that git tracks of code, tests and
documentation. Where it is right, a pattern of its line says so: a fraction is a share, and processes share memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOOKED_AT = (".py", ".md", ".toml", ".ipynb", ".service", ".yaml", ".crontab")
LEFT = re.compile(  # what was so then, and this list
    r"CHANGELOG\.md|tests/archives/.*|benchmarks/results/.*|tools/check_words\.py|tests/test_words\.py"
)


class Word(NamedTuple):
    """A word that must not come back.

    Attributes:
        pattern: what finds it.
        say: what is said instead.
        right: what a line has in which it is right.
    """

    pattern: str
    say: str
    right: str = ""


WORDS = (
    Word(r"\b[Tt]eams?\b", "executor, worker pool", r'"Team"'),
    Word(r"\b[Ss]eat(s|ed)?\b", "rank"),
    Word(r"\b[Dd]esks?\b", "resources, worker requirements", r"\b([Oo]n|[Aa]t) a desk\b"),
    Word(r"\b[Dd]uels?\b|_duels?\b", "one-vs-one"),
    Word(r"\b[Ll]ockstep\b", "batched optimiser"),
    Word(r"\b[Bb]ooks?\b", "ledger, record, counts"),
    Word(r"\b([Ll]ast night|[Tt]onight)\b", "previous run, this run"),
    Word(r"\b[Vv]erbs?\b|_verbs?\b", "command", r"\bverb = |\bnoun\b|\{verb|test_verbs|its two forms|subject, verb, object"),
    Word(r"\b[Pp]ut(s|ting)? up with\b", "tolerate"),
    Word(r"\bdealt anew\b|\bas far apart as\b", "permutation p-value, permuted"),
    Word(r"\b(SLICE|LONGEST_SLICE)\b|(?<!\")\b[Ss]lices\b(?!\")(?=.* (listing|workers?|tasks?)\b)", "shard, task"),
    Word(r"\bWanted\b", "ComparisonRequest, missing columns"),
    Word(r"\bclass Order\b|\b[Aa]n order (says|travels|goes)\b", "work, shard"),
    Word(r"\.shared\(\)|\bdef shared\b|\bshare_out\b|\brow_shard as share\b", "row_shards", r"\balias"),
    Word(r"\bparts_of_share\b|\bshare_prefix\b|\"share-\"", "shard", r"\bformer|\balias"),
    Word(r"\b(a|each|the) share's (rows|features)\b|\bin a share\.|\bshares of a spread\b|\bprepared\.shares\b", "shard"),
    Word(r"\btasks shard\b|\bprocesses shard\b", "share, as a verb"),
)  # fmt: skip


def found(text: str) -> Iterator[tuple[int, str, Word]]:
    """Lines of a text that have one of `WORDS` where it is not right: their number, what was found, and the word."""
    words = [
        word for word in WORDS if re.search(word.pattern, text)
    ]  # most texts have none, and are looked through once
    for number, line in enumerate(text.splitlines() if words else (), 1):
        for word in words:
            match = re.search(word.pattern, line)
            if match and not (word.right and re.search(word.right, line)):
                yield number, match[0], word


def main() -> int:
    """Prints each place; exit code 1 if there is one."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wrong = 0
    for name in listed.splitlines():
        path = ROOT / name
        if name.endswith(LOOKED_AT) and not LEFT.fullmatch(name) and path.exists():
            for number, text, word in found(path.read_text()):
                print(f"{name}:{number}: {text!r}; say {word.say}", file=sys.stderr)
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
