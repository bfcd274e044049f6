"""`Answer`: one choice of a request on its way to the client. Only it decides which token is the last."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ..api.confidence import Calibration, disagreement
from ..api.output import Output, Timings, Usage
from ..api.request import FinishReason, Request
from ..errors import InvalidRequestError, MotetError, NumericalError
from ..schedule.batch import StepOutput
from ..schedule.packing import GroupTokens
from ..schedule.sequence import Group
from ..text.stream import TextStream

log = logging.getLogger("motet.engine")
OnOutput = Callable[[Output], None]
OnSent = Callable[[], None]


@dataclass(slots=True, eq=False)
class Answer:
    """A group, its tokens as text, and its times (seconds, monotonic clock)."""

    request: Request
    group: Group
    text: TextStream
    on_output: OnOutput
    on_sent: OnSent | None
    arrived: float
    calibration: Calibration | None = None
    confidence_sum: float = 0.0  # over the tokens so far
    admitted: float | None = None
    first_token: float | None = None
    delta: Output = field(init=False)  # tokens and text that were not sent yet

    def __post_init__(self) -> None:
        self.delta = self._empty()

    def push(self, token_id: int) -> FinishReason | None:
        """Add the token that was just appended to the group. Returns the reason if it is the last one, else None. The
        text of a stop token is added with `include_stop_str_in_output` only."""
        group, delta = self.group, self.delta
        delta.token_ids.append(token_id)
        if token_id in group.stop_ids:
            delta.stop_matched = token_id
            if group.params.include_stop_str_in_output:
                delta.text += self.text.push(token_id, may_stop=False)
            return FinishReason.STOP
        delta.text += self.text.push(token_id, may_stop=len(group.output) >= group.params.min_tokens)
        if self.text.stopped is not None:
            delta.stop_matched = self.text.stopped
            return FinishReason.STOP
        if group.editor.matcher is not None and group.editor.matcher.is_complete:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(group.output) >= group.max_tokens else None

    def add_logprobs(self, run: GroupTokens, output: StepOutput) -> None:
        """Add the log-probabilities of the tokens that a step drew for the group, those that the request asks for."""
        if run.scored_ids:
            self._add_prompt_logprobs(run, output)
        samples = slice(run.first + len(run.scored_ids), run.first + run.count)
        if self.group.params.logprobs is not None:
            self.delta.logprobs += output.logprobs[samples].tolist()
            self.delta.top_logprobs += output.top_logprobs[samples]
        if self.group.params.logprob_token_ids:
            self.delta.candidate_logprobs += output.candidate_logprobs[samples]
        if self.request.return_member_logprobs:
            self.delta.member_logprobs += output.member_logprobs[samples]
        if self.calibration is not None and self.request.return_confidence:
            mix = [member.mix for member in self.request.ensemble.members]
            for logprob, members in zip(output.logprobs[samples].tolist(), output.member_logprobs[samples]):
                apart = disagreement(members, mix)
                self.delta.disagreement.append(apart)
                self.delta.confidence.append(self.calibration.confidence(logprob, apart))
                self.confidence_sum += self.delta.confidence[-1]

    def _add_prompt_logprobs(self, run: GroupTokens, output: StepOutput) -> None:
        for index, token_id in enumerate(run.scored_ids, run.first):
            drawn = output.token_ids[index] == token_id  # else nothing could force it: its logit is -inf
            self.delta.prompt_logprobs.append(float(output.logprobs[index]) if drawn else -math.inf)
        self.delta.prompt_top_logprobs += output.top_logprobs[run.first : run.first + len(run.scored_ids)]

    def no_token(self, reason: str) -> MotetError:
        """Why the answer ends, if no token could be drawn for this reason."""
        matcher = self.group.editor.matcher
        if matcher is not None and matcher.failure:
            return InvalidRequestError(
                f"the answer's structure is too complex here ({matcher.failure}); simplify it", field="structure"
            )
        return NumericalError(f"no token for request '{self.group.request_id}': {reason}")

    def take_delta(self) -> Output:
        """What became ready since the last call. The caller owns it."""
        delta, self.delta = self.delta, self._empty()
        return delta

    def last_delta(self, reason: FinishReason, error: MotetError | None, now: float) -> Output:
        """The rest of the answer, with the reason, usage and timings. Its last characters may complete a stop
        string."""
        delta = self.take_delta()
        delta.text += self.text.flush()
        if reason is FinishReason.LENGTH and self.text.stopped is not None:
            reason, delta.stop_matched = FinishReason.STOP, self.text.stopped
        delta.finish_reason, delta.error = reason, error
        delta.usage, delta.timings = self._usage(), self._timings(now)
        if self.calibration is not None and self.request.return_confidence:
            delta.answer_confidence = self.confidence_sum / max(1, len(self.group.output))
            delta.abstained = delta.answer_confidence < (self.request.abstain_below or 0.0)
        return delta

    def _empty(self) -> Output:
        return Output(self.group.request_id, self.group.choice, self.group.seed)

    def _usage(self) -> Usage:
        prompt = len(self.request.prompts[0])
        return Usage(prompt, len(self.group.output), min(self.group.sequences[0].num_cached, prompt))

    def _timings(self, now: float) -> Timings:
        admitted = self.admitted if self.admitted is not None else now
        first = self.first_token if self.first_token is not None else now
        return Timings(admitted - self.arrived, max(0.0, first - admitted), now - first)


class Sender:
    """Hands outputs to the callbacks of their answers. What these raise is logged and ends nothing."""

    def __init__(self) -> None:
        self._untold: dict[OnSent, None] = {}

    def send(self, answer: Answer, output: Output) -> None:
        try:
            answer.on_output(output)
        except Exception:
            log.exception("on_output of request '%s' failed", output.request_id)
        if answer.on_sent is not None:
            self._untold[answer.on_sent] = None

    def tell(self) -> None:
        """Call the `on_sent` of all answers that were sent something since the last time, each once."""
        untold, self._untold = self._untold, {}
        for on_sent in untold:
            try:
                on_sent()
            except Exception:
                log.exception("on_sent of a request failed")
