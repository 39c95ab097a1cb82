"""What a chat template tells about thinking and tool calls, and whether a prompt ends inside the thinking."""

from __future__ import annotations

import pytest

from llama_sessions.errors import OptionError
from llama_sessions.reply_format import ReplyFormat, ToolFormat

ANY = tuple(ToolFormat)

# What real templates say, cut down to the lines that tell.
QWEN3 = r"""{%- if tools %}{{- '<|im_start|>system\n' }}{{- "For each function call, return a json object within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}{%- endif %}
{%- if '</think>' in content %}{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"""  # noqa: E501
HERMES3 = r"""{{- '{"type": "function", "function": {"name": "' + tool.name + '", "parameters": ' + tool.parameters | tojson }}{{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-dict>}\n</tool_call>" }}"""  # noqa: E501
MISTRAL = """{%- for tool in tools %}{{- '{"type": "function", "function": {' }}{%- for key, val in tool.function.items() %}{{- '"' + key + '": ' + val | tojson }}{%- endfor %}{%- endfor %}{{- "[TOOL_CALLS] [" }}"""  # noqa: E501
MAGISTRAL = """{%- set default_system_message = 'First draft your thinking process, in this format: [THINK]Your thoughts[/THINK]Here, provide a self-contained response.' %}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"""  # noqa: E501
LLAMA31 = """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}{%- if builtin_tools %}{{- "<|python_tag|>" + tool_call.name + ".call(" }}{%- endif %}"""  # noqa: E501
LLAMA32 = r"""{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}"""  # noqa: E501
R1 = r"""{% if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{% endif %}{% if add_generation_prompt %}{{'<|Assistant|>'}}{% endif %}"""  # noqa: E501
SEED = """{%- set think_begin_token = '<seed:think>' %}{%- set think_end_token = '</seed:think>' %}"""
COHERE = """{% if message.thinking %}<|START_THINKING|>{{ message.thinking }}<|END_THINKING|>{% endif %}"""
EXAONE = r"""{% if '</thought>' in content %}{% set content = content.split('</thought>')[-1].lstrip('\n') %}{% endif %}{% if add_generation_prompt %}{{ '[|assistant|]<thought>\n' }}{% endif %}"""  # noqa: E501
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "think_open", "think_close"),
    [
        (QWEN3, "<think>", "</think>"),
        (R1, "<think>", "</think>"),
        (MAGISTRAL, "[THINK]", "[/THINK]"),
        (SEED, "<seed:think>", "</seed:think>"),
        (COHERE, "<|START_THINKING|>", "<|END_THINKING|>"),
        (EXAONE, "<thought>", "</thought>"),
        ("{{ '<thinking>' + m.reasoning + '</thinking>' }}", "<thinking>", "</thinking>"),
        ("{{ '<|begin_of_thought|>' + t + '<|end_of_thought|>' }}", "<|begin_of_thought|>", "<|end_of_thought|>"),
        ("{{ content.split('<|end_of_thought|>')[-1] }}", "<|start_of_thought|>", "<|end_of_thought|>"),
        ("{{ '<think_start>' }}", "<think_start>", "<think_end>"),
        ("{{ content.split('◁/think▷')[-1] }}", "◁think▷", "◁/think▷"),
        ("{{ content.split('[/THINK]')[-1] }}", "[THINK]", "[/THINK]"),
        ("{{ '<|think|>' + t + '<|/think|>' }}", "<|think|>", "<|/think|>"),
    ],
)
def test_the_thinking_tags_come_from_the_template(source: str, think_open: str, think_close: str) -> None:
    known = ReplyFormat.of(source)
    assert (known.think_open, known.think_close) == (think_open, think_close)


@pytest.mark.parametrize(
    "source",
    [
        PLAIN,
        "",
        "{{ message[thinking] }}{% if enable_thinking %}{% endif %}",  # a look-up
        "{{ '<|think|>\n' if enable_thinking }}",  # asks for thinking, does not stand around it
        "{{ '<rethink>' + '<thinking_budget>' + '<|start_header_id|>' }}",
        r"{{- '<|START_OF_TURN_TOKEN|>' }}",
    ],
)
def test_what_does_not_tell_means_the_tags_that_most_models_have(source: str) -> None:
    known = ReplyFormat.of(source)
    assert (known.think_open, known.think_close) == ("<think>", "</think>")


def test_a_pair_that_is_there_whole_is_preferred_to_a_tag_alone() -> None:
    known = ReplyFormat.of("{{ 'Show your <reasoning>' }}{{ '<thought>' + t + '</thought>' }}")
    assert known.think_open == "<thought>"


@pytest.mark.parametrize(
    ("source", "formats"),
    [
        (QWEN3, (ToolFormat.HERMES,)),
        (HERMES3, (ToolFormat.HERMES,)),
        (MISTRAL, (ToolFormat.MISTRAL,)),
        (MAGISTRAL, (ToolFormat.MISTRAL,)),
        (LLAMA31, (ToolFormat.LLAMA3,)),
        (LLAMA32, (ToolFormat.LLAMA3,)),
        (r'{{ "{\"name\": name, \"parameters\": {}}" }}', (ToolFormat.LLAMA3,)),
        (MISTRAL + HERMES3, (ToolFormat.HERMES, ToolFormat.MISTRAL)),
        ('{{ tool["parameters"] }}', ANY),  # a look-up
        (PLAIN, ANY),
        (R1, ANY),
    ],
)
def test_the_tool_format_comes_from_the_template(source: str, formats: tuple[ToolFormat, ...]) -> None:
    assert ReplyFormat.of(source).tool_formats == formats


@pytest.mark.parametrize(
    ("prompt", "starts"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|Assistant|><think>", True),
        ("<|im_start|>assistant\n<think> \t\r\n\n", True),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\nOkay", False),
        ("", False),
    ],
)
def test_a_prompt_starts_the_thinking_if_the_tag_that_opens_it_stands_last(prompt: str, starts: bool) -> None:
    assert ReplyFormat().starts_thinking(prompt) is starts


def test_only_the_formats_own_tag_starts_its_thinking() -> None:
    known = ReplyFormat(think_open="[THINK]", think_close="[/THINK]")
    assert known.starts_thinking("[INST]hi[/INST][THINK]")
    assert not known.starts_thinking("[INST]hi[/INST]<think>\n")


@pytest.mark.parametrize(
    "options",
    [
        {"think_open": ""},
        {"think_close": "</think>\n"},
        {"think_open": 1},
        {"think_open": "##", "think_close": "##"},
        {"tool_formats": ("hermes?",)},
        {"think_open": "\ud800"},
    ],
)
def test_tags_that_cannot_be_found_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        ReplyFormat(**options)  # type: ignore[arg-type]
