"""A fuzz of the whole generate call on the native backend: random bundles × random requests, against an oracle.

`python -m fuzz --cases 20000 --seed 0` (with `tests` on the path) runs it; `--help` says what else it takes. One round is one
random bundle with some forty requests. A round depends on its seed alone, so a failure is repeated by its number.
"""
