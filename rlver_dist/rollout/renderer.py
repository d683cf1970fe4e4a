"""From messages to token ids and back, without ever tokenising a sampled token again.

A prompt is made by joining token lists: the previous prompt, the reply exactly as sampled, and the template's pieces around the
next user message. The pieces are read off the tokenizer's own chat template by rendering it once with sentinel texts. Message
texts are encoded with `split_special_tokens`, so that a literal "<|im_end|>" from a user stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlver_dist.errors import ConfigError

SENTINELS = {name: f"sentinel{name}text" for name in ("system", "opening", "reply", "answer")}


class Renderer:
    """Chat template of one tokenizer as token lists, with one system prompt.

    Attributes:
        end_token_id: the token that ends an assistant's message; engines have to stop at it.
    """

    def __init__(self, tokenizer: Any, system_prompt: str) -> None:
        """Read the template's pieces.

        Args:
            tokenizer: a Hugging Face tokenizer with a chat template.
            system_prompt: the policy's system message; empty sends none.

        Raises:
            ConfigError: the template cannot be cut into pieces, or joining them does not give the template's own tokens.
        """
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        before_system, before_opening, closing, generation = self._pieces()
        self._head = self._encode_piece(before_system)
        if system_prompt:
            self._head += self._encode_text(system_prompt) + self._encode_piece(before_opening)
        self._generation = self._encode_piece(generation)
        end_and_glue = self._encode_piece(closing)
        if not end_and_glue or end_and_glue[0] not in tokenizer.all_special_ids:
            raise self._refusal("no special token follows the assistant's message")
        self.end_token_id: int = end_and_glue[0]
        self._glue = end_and_glue[1:]
        self._check_joined()

    def opening_prompt(self, user_text: str) -> list[int]:
        """Token ids `[P]` of the first prompt: system message, the user's opening, generation prompt."""
        return [*self._head, *self._encode_text(user_text), *self._generation]

    def next_prompt(self, prompt_ids: Sequence[int], reply_ids: Sequence[int], user_text: str) -> list[int]:
        """Token ids of the prompt after one more exchange; it extends `prompt_ids + reply_ids`.

        A reply that was cut at the token limit has no end token: it is closed here, and the closing token belongs to the prompt.
        """
        closing = [] if reply_ids and reply_ids[-1] == self.end_token_id else [self.end_token_id]
        return [*prompt_ids, *reply_ids, *closing, *self._glue, *self._encode_text(user_text), *self._generation]

    def parse_reply(self, reply_ids: Sequence[int]) -> str:
        """The text that the user hears: special tokens, half characters at a cut and outer white space removed."""
        text = self._tokenizer.decode(list(reply_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd").strip()

    def _messages(self, system: str, opening: str, reply: str, answer: str) -> list[dict[str, str]]:
        spoken = [("user", opening), ("assistant", reply), ("user", answer)]
        # Some templates insert a default system message where none is given, so an empty one is left out, not sent empty.
        with_system = [("system", system), *spoken] if self._system_prompt else spoken
        return [{"role": role, "content": content} for role, content in with_system]

    def _pieces(self) -> tuple[str, str, str, str]:
        """Template text before the system text, before the opening, between reply and user, and after the last user text."""
        try:
            rest = self._tokenizer.apply_chat_template(self._messages(**SENTINELS), tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise self._refusal(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'failed'}") from error
        names = [name for name in SENTINELS if name != "system" or self._system_prompt]
        pieces: dict[str, str] = {}
        for name in names:
            before, found, rest = rest.partition(SENTINELS[name])
            if not found:
                raise self._refusal(f"it drops or reorders the {name} message")
            pieces[name] = before
        head = pieces.get("system", pieces["opening"])
        return head, pieces["opening"], pieces["answer"], rest

    def _check_joined(self) -> None:
        texts = {"system": self._system_prompt, "opening": "I had a bad day.", "reply": "What happened?", "answer": "My dog is ill."}
        expected = self._tokenizer.apply_chat_template(self._messages(**texts), add_generation_prompt=True, return_dict=False)
        reply_ids = [*self._encode_text(texts["reply"]), self.end_token_id]
        if self.next_prompt(self.opening_prompt(texts["opening"]), reply_ids, texts["answer"]) != list(expected):
            raise self._refusal("its tokens are not those of its joined pieces")

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(
            f"model.path={self._tokenizer.name_or_path}: unusable chat template ({reason}); "
            "use a model whose template renders system, user and assistant messages one after the other"
        )

    def _encode_piece(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
