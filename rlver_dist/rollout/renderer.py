"""From messages to token ids and back, without ever tokenising a trained token again.

A prompt is made by joining token lists: the previous prompt, the reply, and the template's pieces around the
next user message. Without thinking the reply stands there exactly as sampled, so a dialogue is one row of
tokens. With thinking only what the user heard stands there, encoded from its text, so each prompt extends the
previous prompt and what was thought never enters one.

The pieces are read off the tokenizer's own chat template by rendering it once with sentinel texts. What is
said is encoded with `split_special_tokens`, so that a literal "<|im_end|>" from a user stays text; the system
message is the run's own and is not, so that the tags that it names are the tokens that the policy has to use.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlver_dist.config.model import ModelConfig
from rlver_dist.errors import ConfigError
from rlver_dist.rollout.think_format import CLOSE_TAG, OPEN_TAG, ParsedReply, split_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINELS = {name: f"sentinel{name}text" for name in ("system", "opening", "reply", "answer")}


def system_prompt(model: ModelConfig, think: bool) -> str:
    """The policy's system message, with the instruction to think first where `think`; empty where there is
    neither."""
    sentences = (model.system_prompt, model.think_instruction if think else "")
    return " ".join(text for text in sentences if text)


class Renderer:
    """Chat template of one tokenizer as token lists, with one system prompt.

    Attributes:
        think: replies are read as thinking and reply, and only the reply enters the next prompt.
        end_token_id: the token that ends an assistant's message; engines have to stop at it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str, think: bool = False) -> None:
        """Read the template's pieces.

        Args:
            tokenizer: a Hugging Face tokenizer with a chat template.
            system_prompt: the policy's system message, the instruction to think included; empty sends none.
            think: see the class.

        Raises:
            ConfigError: the template cannot be cut into pieces, joining them does not give the template's own
                tokens, or its generation prompt opens the thinking itself, which the policy has to do.
        """
        self.think = think
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._unheard = self._special_ids()
        if think:
            # Where tags are special tokens, they must survive decoding.
            self._unheard -= {*self._encode_piece(OPEN_TAG), *self._encode_piece(CLOSE_TAG)}
        before_system, before_opening, closing, generation = self._pieces()
        self._head = self._encode_piece(before_system)
        if system_prompt:
            self._head += self._encode_piece(system_prompt) + self._encode_piece(before_opening)
        # A template that opens the thinking itself would leave the tag out of what is sampled and parsed.
        if OPEN_TAG in generation:
            raise self._refusal(f"its generation prompt already holds {OPEN_TAG}")
        self._generation = self._encode_piece(generation)
        # What follows a reply: the end token, which the policy samples itself, then what the template puts
        # between messages, such as a line break.
        end_and_glue = self._encode_piece(closing)
        if not end_and_glue or end_and_glue[0] not in tokenizer.all_special_ids:
            raise self._refusal("no special token follows the assistant's message")
        self.end_token_id: int = end_and_glue[0]
        self._glue = end_and_glue[1:]
        # A tokenizer may merge characters over a seam between pieces. The joined prompt would then have other
        # tokens than the model was trained on, and nothing later would notice.
        self._check_joined()

    def opening_prompt(self, user_text: str) -> list[int]:
        """Token ids `[P]` of the first prompt: system message, the user's opening, generation prompt."""
        return [*self._head, *self._encode_text(user_text), *self._generation]

    def next_prompt(
        self, prompt_ids: Sequence[int], reply_ids: Sequence[int], reply_text: str, user_text: str
    ) -> list[int]:
        """Token ids of the prompt after one more exchange.

        It extends `prompt_ids + reply_ids`, or with thinking `prompt_ids` and the encoded `reply_text`. A
        reply that was cut at the token limit has no end token: it is closed here, and the closing token
        belongs to the prompt.

        Args:
            prompt_ids: `[P]` what the reply was sampled from.
            reply_ids: `[R]` the reply as sampled.
            reply_text: what the user heard of it.
            user_text: the user's answer.

        Returns:
            `[P']` token ids, longer than `prompt_ids` and beginning with them.
        """
        heard = self._encode_text(reply_text) if self.think else reply_ids
        closing = [] if heard and heard[-1] == self.end_token_id else [self.end_token_id]
        return [*prompt_ids, *heard, *closing, *self._glue, *self._encode_text(user_text), *self._generation]

    def parse_reply(self, reply_ids: Sequence[int]) -> ParsedReply:
        """What a reply says: without special tokens, half characters at a cut and outer white space.

        Without thinking the user hears all of it, and it is well-formed where there is any text. With
        thinking `split_thinking` says what is heard.

        Args:
            reply_ids: `[R]` as sampled.
        """
        text = self._decode(reply_ids)
        if not self.think:
            reply = text.strip()
            return ParsedReply(thinking="", reply=reply, well_formed=bool(reply), thinking_tokens=0)
        thinking, reply, well_formed = split_thinking(text)
        # Tags may be several tokens, so tokens cannot be searched for one. The number of closing tags grows
        # with the prefix: bisection finds the shortest prefix that has all of them in log R decodings.
        lengths = range(len(reply_ids) + 1)
        num_thinking = bisect_left(
            lengths, text.count(CLOSE_TAG), key=lambda n: self._decode(reply_ids[:n]).count(CLOSE_TAG)
        )
        return ParsedReply(
            thinking=thinking, reply=reply, well_formed=well_formed, thinking_tokens=num_thinking
        )

    def encode_reply(self, thinking: str, reply: str) -> list[int]:
        """Token ids `[R]` of a well-formed reply, the end token included; without thinking `thinking` is left
        out.

        Tags are encoded apart from the text around them, so that they are the same tokens in every reply.

        Raises:
            ValueError: the result would not be well-formed: a text is empty or holds a tag.
        """
        well_formed = (
            split_thinking(f"{OPEN_TAG}{thinking}{CLOSE_TAG}{reply}")[2]
            if self.think
            else bool(reply.strip())
        )
        if not well_formed:
            raise ValueError(f"no well-formed reply: thinking {thinking!r}, reply {reply!r}")
        if not self.think:
            return [*self._encode_text(reply), self.end_token_id]
        thought = [
            *self._encode_piece(OPEN_TAG),
            *self._encode_text(thinking),
            *self._encode_piece(CLOSE_TAG),
        ]
        return [*thought, *self._encode_text(f"\n{reply}"), self.end_token_id]

    def _decode(self, reply_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            [token for token in reply_ids if token not in self._unheard], clean_up_tokenization_spaces=False
        )
        return str(text).rstrip("\ufffd")

    def _special_ids(self) -> set[int]:
        # Some tokenizers flag tokens as special, such as tool tags, that `all_special_ids` does not list.
        flagged = (token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special)
        return {*self._tokenizer.all_special_ids, *flagged}

    def _messages(self, system: str, opening: str, reply: str, answer: str) -> list[dict[str, str]]:
        spoken = [("user", opening), ("assistant", reply), ("user", answer)]
        # Some templates insert a default system message where none is given, so an empty one is left out, not
        # sent empty.
        with_system = [("system", system), *spoken] if self._system_prompt else spoken
        return [{"role": role, "content": content} for role, content in with_system]

    def _pieces(self) -> tuple[str, str, str, str]:
        """Template text before the system text, before the opening, between reply and user, and after the
        last user text."""
        try:
            rest = str(
                self._tokenizer.apply_chat_template(
                    self._messages(**SENTINELS), tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:
            raise self._refusal(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'failed'}"
            ) from error
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
        texts = {
            "system": self._system_prompt,
            "opening": "I had a bad day.",
            "reply": "What happened?",
            "answer": "My dog is ill.",
        }
        expected = self._tokenizer.apply_chat_template(
            self._messages(**texts), add_generation_prompt=True, return_dict=False
        )
        reply_ids = [*self._encode_text(texts["reply"]), self.end_token_id]
        opening = self.opening_prompt(texts["opening"])
        if self.next_prompt(opening, reply_ids, texts["reply"], texts["answer"]) != list(expected):
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
