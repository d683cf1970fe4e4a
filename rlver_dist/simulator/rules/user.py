"""The `embedded` backend: simulated users without a language model.

A reply is appraised by rules (see `appraisal.py`), emotion moves by `simulator/emotion.py`, and the answer
comes from `simulator/messages.py`.
"""

from __future__ import annotations

from rlver_dist.dialogue import EndReason, Role
from rlver_dist.simulator.appraiser import Appraiser, appraise_request
from rlver_dist.simulator.emotion import end_reason, move
from rlver_dist.simulator.messages import MessageContext, next_message
from rlver_dist.simulator.presets import DifficultyRules
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from rlver_dist.simulator.suitability import check_personas


class EmbeddedSimulator:
    """A `UserSimulator`: holds the rules and the appraiser, and no dialogue."""

    def __init__(self, *, rules: DifficultyRules, appraiser: Appraiser) -> None:
        self.rules = rules
        self._appraiser = appraiser

    def respond(self, request: UserRequest) -> UserResponse:
        """Open the dialogue (`turn_index` -1), or appraise the last reply, move the emotion, and answer or
        end.

        Raises:
            DataError: at the opening, if the persona is not one that this backend can speak for.
            ValueError: the last message is not the policy's.
        """
        if request.turn_index < 0:
            check_personas([request.persona])
            return UserResponse(
                appraisal=None,
                emotion=self.rules.emotion.start,
                message=request.persona.opening,
                end_reason=None,
            )
        if not request.messages or request.messages[-1].role is not Role.ASSISTANT:
            raise ValueError(
                f"dialogue {request.dialogue_id}, turn {request.turn_index}: the last message must be the "
                f"policy's reply"
            )
        appraisal = appraise_request(self._appraiser, request, self.rules)
        emotion = move(request.emotion, appraisal.change, self.rules.emotion)
        ending = end_reason(
            emotion,
            rules=self.rules.emotion,
            num_replies=request.turn_index + 1,
            max_turns=request.max_turns,
        )
        if ending is not None:
            return UserResponse(appraisal=appraisal, emotion=emotion, message=None, end_reason=ending)
        message = next_message(
            MessageContext(
                persona=request.persona,
                messages=request.messages,
                emotion=emotion,
                change=appraisal.change,
                truncated=request.truncated,
                rules=self.rules,
                seed=request.seed,
            )
        )
        return UserResponse(
            appraisal=appraisal,
            emotion=emotion,
            message=message,
            end_reason=EndReason.GOODBYE if message is None else None,
        )
