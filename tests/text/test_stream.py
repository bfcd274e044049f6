"""Tokens to text: the same text however it is cut into tokens, and never a stop string in it."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.text.stream import TextStream, answer_stream


class Pieces:
    """An incremental decoder whose token i is the i-th piece of a text; the last `late` pieces come with the flush."""

    def __init__(self, pieces, late=0):
        self.pieces = pieces
        self.late = late

    def push(self, token_ids):
        return "".join(self.pieces[i] for i in token_ids if i < len(self.pieces) - self.late)

    def flush(self):
        return "".join(self.pieces[len(self.pieces) - self.late :])


def stream(pieces, stop, late=0):
    """Deltas and the stop string that ended them."""
    text = TextStream(Pieces(pieces, late), tuple(stop))
    deltas = []
    for index in range(len(pieces)):
        deltas.append(text.push(index))
        if text.stopped is not None:
            return deltas, text.stopped
    return [*deltas, text.flush()], text.stopped


def plain(text, stop):
    """What `stream` must give, letter by letter."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            string = max(found, key=len)
            return text[: end - len(string)], string
    return text, None


letters = st.text("ab", min_size=1, max_size=5)


@given(st.lists(letters, max_size=12), st.lists(letters, max_size=4, unique=True), st.integers(0, 2))
@example(["aab", "ab"], ["abab"], 0)
@example(["xab", "c"], ["abd", "bc"], 0)
@example(["a", "b"], ["ab"], 1)
def test_the_cut_does_not_depend_on_the_tokens(pieces, stop, late):
    deltas, stopped = stream(pieces, stop, min(late, len(pieces)))
    assert ("".join(deltas), stopped) == plain("".join(pieces), stop)


@given(st.lists(letters, max_size=12), st.lists(letters, min_size=1, max_size=4, unique=True))
def test_no_more_is_held_back_than_must_be(pieces, stop):
    text = TextStream(Pieces(pieces), tuple(stop))
    given_out = ""
    for index in range(len(pieces)):
        given_out += text.push(index)
        if text.stopped is not None:
            return
        held = "".join(pieces[: index + 1])[len(given_out) :]
        assert held == "" or any(string.startswith(held) for string in stop)


def test_stop_strings_across_tokens():
    assert stream(["Hel", "lo<", "/s", "> more"], ["</s>"]) == (["Hel", "lo", "", ""], "</s>")
    assert stream(["a<", "b"], ["</s>"]) == (["a", "<b", ""], None)
    assert stream(["a</"], ["</s>"]) == (["a", "</"], None)


def test_no_stop_string_ends_before_it_may():
    """With min_tokens a stop string in the first tokens is text; one that ends later still counts, whole."""
    text = TextStream(Pieces(["ab", "xa", "b", "tail"]), ("ab",))
    assert text.push(0, may_stop=False) == "ab"
    assert text.push(1, may_stop=False) == "x"
    assert text.push(2) == ""
    assert text.stopped == "ab"
    assert text.flush() == ""


def test_a_whole_stop_string_that_may_not_stop_is_not_held_back():
    assert TextStream(Pieces(["ab"]), ("ab", "zzzz")).push(0, may_stop=False) == "ab"


def test_a_short_stop_string_inside_held_text_is_not_found_late():
    text = TextStream(Pieces(["xab", "c", "ab"]), ("ab", "xabz"))
    assert text.push(0, may_stop=False) == ""  # may become xabz
    assert text.push(1) == "xabc"
    assert text.stopped is None
    assert text.push(2) == ""
    assert text.stopped == "ab"


def test_many_long_stop_strings():
    """64 strings of 1024 letters that share all but the end of a text: held back as a whole, given out as a whole."""
    stop = tuple("a" * (1000 + i) + "b" for i in range(23)) + tuple(f"{i:02}" * 500 for i in range(41))
    pieces = ["a"] * 2000 + ["c"]
    deltas, stopped = stream(pieces, stop)
    assert stopped is None
    assert "".join(deltas) == "a" * 2000 + "c"
    assert stream([*pieces[:1500], "b"], stop) == ([""] * 1022 + ["a"] * 478 + [""], "a" * 1022 + "b")


def test_characters_of_several_tokens(tokenizer):
    """The byte-level tokenizer has a token a byte: no delta holds half a character."""
    text = TextStream(tokenizer.stream(), ("ön!",))
    deltas = [text.push(token_id) for token_id in tokenizer.encode("grün €, schön!")]
    assert "".join(deltas) == "grün €, sch"
    assert text.stopped == "ön!"
    assert all("\N{REPLACEMENT CHARACTER}" not in delta for delta in deltas)


def test_a_stop_string_may_contain_special_tokens(tokenizer):
    """They are compared with it, and are no part of the text that is sent."""
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    ids = [*tokenizer.encode("ab"), start, *tokenizer.encode("cd"), end, *tokenizer.encode("\nef")]

    def sent(*stop, **fields):
        stream, deltas = answer_stream(tokenizer, (), SamplingParams(stop=stop, **fields)), []
        for token_id in ids:
            deltas.append(stream.push(token_id))
            if stream.stopped is not None:
                break
        return "".join([*deltas, stream.flush()]), stream.stopped

    assert sent() == ("abcd\nef", None)
    assert sent("<|im_end|>") == ("abcd", "<|im_end|>")
    assert sent("d<|im_end|>\n") == ("abc", "d<|im_end|>\n")
    assert sent("b<|im_start|>c") == ("a", "b<|im_start|>c")
    assert sent("<|im_end|>x", "ef") == ("abcd\n", "ef")
    assert sent("bc") == ("a", "bc")  # as long as no stop string names a special token, there are none in the text
    assert sent("<|im_end|>x") == ("abcd\nef", None)
    assert sent(skip_special_tokens=False) == ("ab<|im_start|>cd<|im_end|>\nef", None)
    assert sent("c", skip_special_tokens=False) == ("ab<|im_start|>", "c")
    assert sent("d<|im_end|>", skip_special_tokens=False, include_stop_str_in_output=True) == (
        "ab<|im_start|>cd<|im_end|>",
        "d<|im_end|>",
    )
    assert sent("d<|im_end|>", include_stop_str_in_output=True) == ("abcd", "d<|im_end|>")
    assert sent("bcd", include_stop_str_in_output=True) == ("abcd", "bcd")
