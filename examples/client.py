"""Ask a Motet server from Python: stream an answer of an ensemble, and tell the errors apart.

    motet serve .motet/bundles/demo &
    python examples/client.py "What is a motet?" --mix code=0.3,docs=0.7

Without --mix the bundle's own members and coefficients answer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping

from motet import Client, MotetError
from motet.runtime.errors import InvalidRequestError, OverloadedError

ATTEMPTS = 5


def stream(client: Client, prompt: str, mix: Mapping[str, float] | None) -> None:
    """Print the answer as it comes. Leaving the loop early would cancel the request on the server."""
    messages = [{"role": "user", "content": prompt}]
    for delta in client.generate(messages, mix=mix, max_tokens=200, temperature=0.7, top_p=0.95, timeout_s=60):
        print(delta.text, end="", flush=True)
        if delta.finish_reason is not None and delta.usage is not None:
            print()
            print(
                f"[{delta.finish_reason}, {delta.usage.completion_tokens} tokens, seed {delta.seed}]", file=sys.stderr
            )


def ask(address: str, prompt: str, mix: Mapping[str, float] | None) -> int:
    """The exit code: 0 answered, 2 the request was wrong, 1 the server could not."""
    with Client(address) as client:
        for attempt in range(ATTEMPTS):
            try:
                stream(client, prompt, mix)
                return 0
            except OverloadedError:  # the queue is full; nothing was streamed, so the request may be sent again
                time.sleep(2**attempt / 4)
            except InvalidRequestError as error:  # the message says the field, the limit, the value and what to change
                print(f"the request was refused: {error}", file=sys.stderr)
                return 2
            except MotetError as error:  # no server, a deadline, an error in the server
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                return 1
    print(f"the server was busy {ATTEMPTS} times; try again later", file=sys.stderr)
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream one answer from a Motet server.")
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--mix", metavar="NAME=COEFFICIENT,…", help="members and coefficients, which sum to 1")
    options = parser.parse_args()
    pairs = (text.partition("=") for text in (options.mix or "").split(",") if text)
    mix = {name: float(value) for name, _, value in pairs}
    sys.exit(ask(options.address, options.prompt, mix or None))


if __name__ == "__main__":
    main()
