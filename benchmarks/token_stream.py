"""What a stream of training windows costs beyond tokenising its text, and what memory it takes.

    python -m benchmarks.token_stream

CPU time of reading, packing, shuffling and batching a JSON-lines file against one call of the
tokenizer a document, in turns; then the resident memory that going through a long file adds.
The tokenizer is the tiny model's (a token a byte, so the Python around it weighs most).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.common import MIB, alternate, arguments, finish, forget_peak, memory, ratio, verdict
from secateur.data.stream import open_stream
from secateur.data.texts import load_text
from secateur.models.tiny import tiny_tokenizer

LIMIT = 1.5
MEMORY_LIMIT = 64.0


def main() -> None:
    """See the module."""
    given = arguments(__doc__).parse_args()
    tokenizer = tiny_tokenizer()
    documents = load_text("pydoc").documents
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pydoc.jsonl"
        lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
        path.write_text(lines * 2)

        def plain() -> None:
            for document in documents * 2:
                tokenizer([document], add_special_tokens=False)["input_ids"]

        def stream() -> None:
            data = open_stream(path, tokenizer, 512, block=256)
            order, at = data.order(0), 0
            while data.total is None or at + 8 <= data.total:
                data.batch(order.rows(at, 8))
                at += 8

        seconds = alternate({"plain": plain, "stream": stream}, 5)
        sizes = {}
        for copies in (6, 48):
            long = Path(folder) / "long.jsonl"
            long.write_text(lines * copies)
            start = memory("VmRSS")
            forget_peak()
            data = open_stream(long, tokenizer, 512, block=256)
            number = 0
            while len(data.windows(number)):
                number += 1
            added = (memory("VmHWM") - start) / MIB
            sizes[f"{long.stat().st_size / MIB:.1f} MiB"] = round(added, 1)
    cost = ratio(seconds["stream"], seconds["plain"])
    finish(
        "token_stream",
        {
            "cpu_time_against_the_tokenizer": cost,
            "verdict": verdict(cost["median"], LIMIT),
            "resident_mib_added_by_file": sizes,
            "memory_verdict": verdict(max(sizes.values()), MEMORY_LIMIT),
        },
        given.json,
    )
    print(json.dumps({"cost": cost, "resident_mib_added": sizes}))


if __name__ == "__main__":
    main()
