"""Conversations as tokens, against transformers' own apply_chat_template and what trl documents for its masks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layershed.errors import ChatTemplateError
from layershed.training.chat import IGNORED, Encoded, encode_conversation, prompt_ids, shorten
from layershed.training.conversations import Columns, Conversation, RowError, conversation_of, find_columns
from layershed.training.tokenizer import check_chat_template, load_tokenizer
from tests.support.chats import CHATML, ENDED, FORGETFUL, MARKED, assistant, fast_tokenizer, system, user

TURNS = [system("Be brief."), user("2+2?"), assistant("It is 4."), user("é?"), assistant("Yes ☺.")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
WITH_TOOLS = [user("2+2?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "4"}, assistant("It is 4.")]
TOKENIZERS = {
    "prefixes": lambda: fast_tokenizer(CHATML),
    "generation": lambda: fast_tokenizer(MARKED),
    "bytes": lambda: load_tokenizer(None),
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def learned(tokenizer, encoded):
    """The text of every run of answer tokens."""
    runs, before = [], False
    for token, answer in zip(encoded.input_ids, encoded.answers, strict=True):
        if answer:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = answer
    return [tokenizer.decode(run) for run in runs]


@every_tokenizer
@pytest.mark.parametrize(("messages", "tools"), [(TURNS, None), (WITH_TOOLS, TOOLS)], ids=["turns", "tools"])
def test_tokens_of_a_conversation_are_those_of_apply_chat_template(name, messages, tools):
    if name == "generation" and tools:
        pytest.skip("that template writes no tools")
    tokenizer = TOKENIZERS[name]()
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    assert encode_conversation(tokenizer, Conversation(messages, tools)).input_ids == expected
    asked = tokenizer.apply_chat_template(
        messages[:-1], tools=tools, tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prompt_ids(tokenizer, Conversation(messages[:-1], tools)) == asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "prefixes",
            ["It is 4.<|im_end|>\n", "Yes ☺.<|im_end|>\n"],
        ),  # as completion_only_loss: to the end of the message
        ("generation", ["It is 4.<|im_end|>", "Yes ☺.<|im_end|>"]),  # as assistant_only_loss: what the template marks
        ("bytes", ["It is 4.</s>", "Yes ☺.</s>"]),
    ],
)
def test_only_answers_and_their_ends_have_labels(name, expected):
    tokenizer = TOKENIZERS[name]()
    encoded = encode_conversation(tokenizer, Conversation(TURNS))
    assert learned(tokenizer, encoded) == expected
    labels = encoded.labels(mask_prompts=True)
    assert [label for label in labels if label != IGNORED] == [
        token for token, answer in zip(encoded.input_ids, encoded.answers, strict=True) if answer
    ]
    assert encoded.labels(mask_prompts=False) == encoded.input_ids


def test_calls_of_tools_are_learned_and_their_results_are_not():
    tokenizer = fast_tokenizer(CHATML)
    runs = learned(tokenizer, encode_conversation(tokenizer, Conversation(WITH_TOOLS, TOOLS)))
    assert len(runs) == 2
    assert '"name": "add"' in runs[0]
    assert runs[1] == "It is 4.<|im_end|>\n"


@every_tokenizer
def test_mask_of_a_pair_is_trls_completion_mask(name):
    """trl: the tokens after those of the prompt with the prompt for an answer; answers within the prompt are masked."""
    tokenizer = TOKENIZERS[name]()
    prompt, completion = TURNS[:-1], TURNS[-1:]
    encoded = encode_conversation(
        tokenizer, conversation_of({"p": prompt, "c": completion}, Columns(prompt="p", response="c"))
    )
    before = len(
        tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    expected = [index >= before for index in range(len(encoded.input_ids))]
    if name == "generation":  # the line end after the mark is not an answer
        expected[-1] = False
    assert encoded.answers == expected


def test_template_that_rewrites_earlier_messages_is_refused_unless_all_is_learned():
    tokenizer = fast_tokenizer(FORGETFUL)
    reason = r"message 3 differently .* \{% generation %\} .*mask_prompts to false"
    with pytest.raises(ChatTemplateError, match=reason):
        encode_conversation(tokenizer, Conversation(TURNS))
    everything = encode_conversation(tokenizer, Conversation(TURNS), mask_prompts=False)
    assert everything.labels(mask_prompts=False) == everything.input_ids
    assert shorten(everything, 5).input_ids == everything.input_ids[-5:]


@pytest.mark.parametrize(
    ("template", "expected"),
    [(FORGETFUL, "<think></think>It is 4.<|im_end|>\n"), (ENDED, "It is 4.<|im_end|>\n<|end|>")],
    ids=["thinking", "with an end of text"],
)
def test_single_answer_is_learned_also_with_an_unstable_template(template, expected):
    tokenizer = fast_tokenizer(template)
    assert learned(tokenizer, encode_conversation(tokenizer, Conversation(TURNS[:3]))) == [expected]


def test_prompt_that_holds_more_than_the_answer_begins_with_masks_what_they_share():
    thinking = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    tokenizer = fast_tokenizer(thinking)
    assert learned(tokenizer, encode_conversation(tokenizer, Conversation(TURNS[:3]))) == ["It is 4.<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML + "{{ raise_exception('no system role') }}", r"refuses the messages \(no system role\)"),
        ("{% for message in messages %}{{ message.role + message.nothing }}{% endfor %}", "refuses the messages"),
        (MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "{% generation %}{% endgeneration %}"),
         "writes no answer"),
    ],
    ids=["raises", "needs another key", "marks nothing"],
)  # fmt: skip
def test_template_that_cannot_write_the_messages_is_a_typed_error(template, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        encode_conversation(fast_tokenizer(template), Conversation(TURNS))


def test_tokenizer_without_a_template_is_an_error_that_says_what_to_do():
    with pytest.raises(ChatTemplateError, match=r"'base' has no chat template.*data.tokenizer.*data.chat_template"):
        check_chat_template(fast_tokenizer(None), "base")


# --- truncation ------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=3, max_size=30).filter(any), st.integers(2, 12))
def test_shortened_conversation_is_a_run_of_it_with_its_last_answer(answers, size):
    whole = Encoded(list(range(len(answers))), answers)
    kept = shorten(whole, size)
    first = kept.input_ids[0]
    assert kept.input_ids == whole.input_ids[first : first + len(kept.input_ids)]
    assert kept.answers == answers[first : first + len(kept.input_ids)]
    assert len(kept.input_ids) == min(size, len(answers))
    end = max(index for index, answer in enumerate(answers) if answer)
    start = max((index + 1 for index in range(end) if not answers[index]), default=0)
    last_answer = [*range(start, end + 1)]
    inside = [token for token in last_answer if token in kept.input_ids]
    # whole with a token before it if that fits; else its beginning
    assert inside == last_answer[: size - (start > 0)]


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (["id", "messages"], {}, Columns(messages="messages")),
        (["prompt", "prompt_id", "messages"], {}, Columns(messages="messages")),
        (["prompt", "response"], {}, Columns(prompt="prompt", response="response")),
        (["prompt", "completion"], {}, Columns(prompt="prompt", response="completion")),
        (["instruction", "output"], {"prompt": "instruction", "response": "output"},
         Columns(prompt="instruction", response="output")),
        (["messages", "a", "b"], {"prompt": "a", "response": "b"}, Columns(prompt="a", response="b")),
        (["prompt"], {}, None),
        (["text"], {}, None),
    ],
)  # fmt: skip
def test_columns_of_conversations_are_found_by_name(names, options, expected):
    assert find_columns(names, **{"prompt": "prompt", "response": None, **options}) == expected


MESSAGES, PAIR = Columns(messages="messages"), Columns(prompt="prompt", response="response")


def test_row_becomes_a_conversation_without_empty_keys():
    row = {"messages": [{"role": "user", "content": "a", "name": None}, assistant("b")], "tools": '[{"name": "f"}]'}
    assert conversation_of(row, MESSAGES) == Conversation([user("a"), assistant("b")], [{"name": "f"}])
    assert conversation_of({"prompt": "a", "response": "b", "tools": None}, PAIR) == Conversation(
        [user("a"), assistant("b")], None, 1
    )


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"messages": None}, MESSAGES, "'messages' is missing"),
        ({"messages": []}, MESSAGES, "'messages' holds no message"),
        ({"messages": "hi"}, MESSAGES, "'messages' must be a list of messages .* but it is a str"),
        ({"messages": {"role": "user"}}, MESSAGES, "must be a list .* but it is a dict"),
        ({"messages": ["hi"]}, MESSAGES, "message 1 must hold role and content, but it is a str"),
        ({"messages": [{"from": "human", "value": "x"}]}, MESSAGES, r"no role \(its keys: from, value\); call it role"),
        ({"messages": [user("a"), {"role": "gpt", "content": "b"}]}, MESSAGES, "message 2 has the role 'gpt'; use"),
        ({"messages": [{"role": "user"}]}, MESSAGES, "message 1 has no content"),
        ({"messages": [user(3)]}, MESSAGES, "content of message 1 must be text, but it is a int"),
        ({"messages": [user([{"type": "text"}])]}, MESSAGES, "content of message 1 must be text, but it is a list"),
        ({"messages": [user("a"), assistant(" ")]}, MESSAGES, "the answer in message 2 is empty"),
        ({"messages": [user("a")]}, MESSAGES, "no message is the assistant's"),
        ({"messages": [user("a"), assistant("b")], "tools": "{"}, MESSAGES, "'tools' is no JSON"),
        ({"messages": [user("a"), assistant("b")], "tools": 3}, MESSAGES, "'tools' must be a list .* but it is a int"),
        ({"prompt": "a", "response": None}, PAIR, "'response' is missing"),
        ({"prompt": None, "response": "b"}, PAIR, "'prompt' is missing"),
        ({"prompt": "a", "response": "\n"}, PAIR, "the answer in 'response' is empty"),
        ({"prompt": 5, "response": "b"}, PAIR, "'prompt' must be text or a list of messages, but it is a int"),
        ({"prompt": [user("a"), assistant("b")], "response": [user("c")]}, PAIR, "no message is the assistant's"),
    ],
)  # fmt: skip
def test_row_that_is_no_conversation_is_an_error_with_its_reason(row, columns, reason):
    with pytest.raises(RowError, match=reason):
        conversation_of(row, columns)


def test_empty_system_message_is_no_error():
    assert conversation_of({"messages": [system(""), user("a"), assistant("b")]}, MESSAGES).messages[0] == system("")
