"""What a request may bring and what an answer may hold: the only table of these limits.

Each limit is asked before the work that it bounds, whichever door the request came through. Limits of a server's
capacity (`max_model_len`, `max_num_seqs`, `max_waiting`, `max_requests`) are fields of `EngineConfig`.
"""

from __future__ import annotations

# ---- messages on the wire, in bytes ----------------------------------------------------------------------------------

# About 260,000 tokens of text. gRPC refuses a larger request by its length, before it is read.
MAX_REQUEST_BYTES = 2**20
# What every gRPC client accepts by default. A whole answer that may become larger is not computed; streams are cut.
MAX_MESSAGE_BYTES = 4 * 2**20
MAX_HTTP_ANSWER_BYTES = 32 * 2**20  # of a whole answer, as counted for a message; its JSON is some times larger
MAX_DELTA_BYTES = 2**16  # about the largest message of a stream; a slow reader's answer is cut into such pieces
MAX_ERROR_BYTES = 1000  # of an error's text: it travels in HTTP/2 trailers, which hold 8 KiB, three times over

MAX_METADATA_BYTES = 16 * 2**10  # of a call's headers
MAX_STREAMS_PER_CONNECTION = 1024
MAX_CONNECTIONS = 4096
MAX_CONCURRENT_CALLS = 4096  # of all connections
MAX_BEGUN_CALLS = 512  # of a host, whose messages have not come
MAX_WATCHERS = 256  # of health, which is open to all

# ---- what a request may bring ----------------------------------------------------------------------------------------

MAX_REQUEST_ID_BYTES = 256  # it is repeated in every message of the answer
MAX_PRIORITY = 1000  # in size
MAX_SALT_BYTES = 256
MAX_MESSAGES = 4096  # of a conversation
MAX_PARTS = 4096  # of the contents of a conversation's messages
MAX_MEDIA_BYTES = 64 * 2**20  # of a request's media of one kind, whatever a server is set to
MAX_TEXTS = 256  # to embed at once
MAX_MEMBERS = 64  # of an ensemble; so many views at most
MAX_NAME_BYTES = 256  # of a member
MAX_MIX = 1000  # absolute value of a coefficient: float32 has 7 digits, and larger terms that cancel leave few
MIN_MEMBER_TEMPERATURE, MAX_MEMBER_TEMPERATURE = 0.01, 100
MAX_LOGIT_BIASES = 65536
MAX_STOPS = 64  # stop strings, and stop token ids
MAX_STOP_BYTES = 1024

MAX_STRUCTURE_BYTES = 64 * 2**10  # of a schema, grammar, regular expression or list of choices
MAX_STRUCTURE_DEPTH = 64  # of JSON
MAX_STRUCTURE_CHOICES = 1000
MAX_STRUCTURE_RULES = 500  # of a grammar: what compiles it follows them in depth

# ---- what an answer may hold -----------------------------------------------------------------------------------------

MAX_CHOICES = 64
MAX_LOGPROBS = 64  # per token
MAX_LOGPROB_TOKEN_IDS = 1024  # per request; each is 4 bytes a token of the answer
MAX_SPECULATIVE_TOKENS = 64  # per draft
