"""Chat templates that a run cannot use are refused with the option that helps."""

import json

import pytest

from rlver_dist.bundled_models import CHAT_TEMPLATE
from rlver_dist.errors import ConfigError
from rlver_dist.preflight.chat_template import TemplateUse, check_template, read_template

WHERE = "model.path=mine"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
)
DROPS_SYSTEM = CHAT_TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)
THINKS = CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'")
SWITCH = CHAT_TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"


def use(*, system=True, think=False, without="model.system_prompt=", **kwargs):
    return TemplateUse(system=system, think=think, kwargs=kwargs, without_system=without)


def test_a_plain_template_passes():
    assert check_template(CHAT_TEMPLATE, WHERE, use()) == []
    assert check_template(NO_SYSTEM, WHERE, use(system=False)) == []


def test_a_missing_or_failing_template_is_refused():
    with pytest.raises(
        ConfigError, match=r"^model.path=mine: its tokenizer has no chat template; use a chat"
    ):
        check_template(None, WHERE, use())
    with pytest.raises(ConfigError, match="its chat template refuses a dialogue"):
        check_template("{{ 1 / 0 }}", WHERE, use())
    with pytest.raises(ConfigError, match="its chat template refuses a dialogue"):
        check_template("{% if %}", WHERE, use())


def test_a_template_without_system_messages_names_the_option():
    with pytest.raises(ConfigError, match=r"refuses a system message \(no system\).*: model.system_prompt=$"):
        check_template(NO_SYSTEM, WHERE, use())
    with pytest.raises(ConfigError, match=r"leaves out a system message.*or model.system_prompt=$"):
        check_template(DROPS_SYSTEM, WHERE, use())
    with pytest.raises(ConfigError, match=r"refuses a system message .*use a model whose template takes it$"):
        check_template(NO_SYSTEM, WHERE, use(without=""))


def test_a_template_that_opens_the_thinking_needs_thinking():
    assert check_template(THINKS, WHERE, use(think=True)) == []
    with pytest.raises(ConfigError, match=r"begins each reply with <think> and rollout.think is off"):
        check_template(THINKS, WHERE, use())


def test_variables_of_the_template_are_handed_over():
    with pytest.raises(ConfigError, match="begins each reply with <think>"):
        check_template(SWITCH, WHERE, use())
    assert check_template(SWITCH, WHERE, use(enable_thinking=False)) == []


def test_a_template_that_tells_the_date_is_warned_of():
    dated = "{{ strftime_now('%d %B') }}" + CHAT_TEMPLATE
    [warning] = check_template(dated, WHERE, use())
    assert warning.startswith("warning: model.path=mine: its chat template tells the date")


def test_templates_are_found_where_transformers_finds_them(tmp_path):
    assert read_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "in config"}))
    assert read_template(tmp_path) == "in config"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_template(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_text("alone")
    assert read_template(tmp_path) == "alone"
