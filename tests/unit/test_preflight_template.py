"""Chat templates that a run cannot use are refused with the option that helps."""

import json

import pytest

from rlver_dist.bundled_models import CHAT_TEMPLATE
from rlver_dist.errors import ConfigError
from rlver_dist.preflight.chat_template import check_template, read_template

WHERE = "model.path=mine"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
)
DROPS_SYSTEM = CHAT_TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)
THINKS = CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<think>\n'")


@pytest.fixture
def check(tmp_path):
    """`check_template` of a folder that holds the template."""

    def run(template, *, system=True, policy=True, without_system="model.system_prompt=''", tokens=None):
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens or {}))
        return check_template(tmp_path, WHERE, system=system, policy=policy, without_system=without_system)

    return run


def test_plain_templates_pass(check):
    assert check(CHAT_TEMPLATE) == []
    assert check(NO_SYSTEM, system=False) == []


def test_templates_find_what_transformers_gives_them(check):
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    assert check("{{ bos_token + eos_token }}" + CHAT_TEMPLATE, tokens=tokens) == []
    assert check("{{ bos_token + '' }}" + CHAT_TEMPLATE) == []
    marked = CHAT_TEMPLATE.replace("{{ '<|im_start|>' + m", "{% generation %}{{ '<|im_start|>' + m").replace(
        "'\n' }}{% endfor %}", "'\n' }}{% endgeneration %}{% endfor %}"
    )
    assert "{% endgeneration %}" in marked and check(marked) == []
    assert check("{% for x in [1] %}{% break %}{% endfor %}{{ [1] | tojson }}" + CHAT_TEMPLATE) == []


def test_a_missing_or_failing_template_is_refused(check):
    with pytest.raises(
        ConfigError, match=r"^model.path=mine: its tokenizer has no chat template; use a chat"
    ):
        check(None)
    with pytest.raises(ConfigError, match=r"refuses a dialogue \(division by zero\); use a model"):
        check("{{ 1 / 0 }}")
    with pytest.raises(ConfigError, match="its chat template refuses a dialogue"):
        check("{% if %}")


def test_a_template_without_system_messages_names_the_option(check):
    with pytest.raises(
        ConfigError, match=r"refuses a system message \(no system\).*, or model.system_prompt=''$"
    ):
        check(NO_SYSTEM)
    with pytest.raises(ConfigError, match=r"leaves out a system message.*, or model.system_prompt=''$"):
        check(DROPS_SYSTEM)
    with pytest.raises(ConfigError, match=r"refuses a system message .*use a model whose template takes it$"):
        check(NO_SYSTEM, without_system="")


def test_a_template_that_opens_the_thinking_is_refused(check):
    with pytest.raises(ConfigError, match=r"begins each reply with <think>, which the policy has to write"):
        check(THINKS)
    assert check(THINKS, policy=False) == []


def test_a_template_that_moves_a_message_is_refused(check):
    last = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match="leaves out an opening, or puts it elsewhere"):
        check(last + "{{ messages[0].content }}")


def test_templates_may_ask_for_tools(check):
    assert check("{% if tools is not none %}{{ raise_exception('x') }}{% endif %}" + CHAT_TEMPLATE) == []


def test_a_template_that_tells_the_date_is_warned_of(check):
    [warning] = check("{{ strftime_now('%d %B') }}" + CHAT_TEMPLATE)
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
