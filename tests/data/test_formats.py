from __future__ import annotations

import json

import pytest

from burnish.data.arguments import DataArguments
from burnish.data.catalog import get_dataset_list
from burnish.data.entry import OPENAI_COLUMNS, OPENAI_TAGS, Columns, DatasetAttr
from burnish.data.formats import align_dataset, detect_formatting
from burnish.data.rows import read_rows
from burnish.data.values import BadRow

ALPACA = DatasetAttr("it", "file", "it.json")
SHAREGPT = DatasetAttr("it", "file", "it.json", "sharegpt")
OPENAI = DatasetAttr("it", "file", "it.json", "openai", columns=OPENAI_COLUMNS, tags=OPENAI_TAGS)

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
ADD_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def turns(*pairs):
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


def messages(row, attr, **kwargs):
    return list(align_dataset(row, attr, **kwargs).messages)


def test_an_alpaca_row_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert messages(row, ALPACA) == [user("Add.\n1 2"), assistant("3")]
    assert messages({**row, "input": ""}, ALPACA) == [user("Add."), assistant("3")]
    assert messages({"instruction": "", "input": "1 2", "output": "3"}, ALPACA) == [user("1 2"), assistant("3")]


def test_alpaca_history_and_system_come_before_the_question():
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    whole = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]
    assert messages(row, ALPACA) == whole
    assert messages({**row, "history": json.dumps(row["history"])}, ALPACA) == whole  # as a csv file has it
    assert messages({**row, "history": "", "system": None}, ALPACA) == whole[3:]


def test_columns_of_other_names_are_used_and_usual_ones_are_not():
    attr = DatasetAttr("it", "file", "x", columns=Columns("q", None, "a", None, None, None, None))
    assert messages({"q": "1", "a": "2", "input": "no", "system": "no"}, attr) == [user("1"), assistant("2")]


def test_the_four_columns_of_2024_are_views_of_an_example():
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s", "tools": [ADD]}
    example = align_dataset(row, ALPACA, place="it.json:1")
    assert (example.prompt, example.response) == ([user("a"), assistant("b"), user("c")], [assistant("d")])
    assert (example.system, json.loads(example.tools_text)) == ("s", [{"type": "function", "function": ADD}])
    assert example.place == "it.json:1"


def test_a_sharegpt_conversation_with_calls_becomes_openais_messages():
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    row = {
        **turns(("human", "1+1?"), ("function_call", call), ("observation", "2"), ("gpt", "It is 2.")),
        "tools": json.dumps([ADD]),
        "system": "s",
    }
    example = align_dataset(row, SHAREGPT)
    assert list(example.messages) == [
        {"role": "system", "content": "s"},
        user("1+1?"),
        {"role": "assistant", "content": None, "tool_calls": [ADD_CALL]},
        {"role": "tool", "content": "2"},
        assistant("It is 2."),
    ]
    assert example.tools == ({"type": "function", "function": ADD},)


def test_calls_side_by_side_and_a_thought_before_them_are_kept():
    value = '<think>\nhm\n</think>\n\n[{"name": "add", "arguments": "{\\"a\\": 1}"}, {"name": "now", "arguments": {}}]'
    now = {"type": "function", "function": {"name": "now", "arguments": {}}}
    row = turns(("human", "x"), ("function_call", value), ("observation", "2"), ("observation", "3"), ("gpt", "y"))
    assert messages(row, SHAREGPT)[1] == {
        "role": "assistant",
        "content": "<think>\nhm\n</think>",
        "tool_calls": [ADD_CALL, now],
    }


def test_a_system_turn_wins_over_the_system_column_and_an_empty_one_says_nothing():
    talk = (("human", "a"), ("gpt", "b"))
    assert messages({**turns(("system", "turn"), *talk), "system": "column"}, SHAREGPT)[0]["content"] == "turn"
    assert messages({**turns(("system", ""), *talk), "system": "column"}, SHAREGPT)[0]["content"] == "column"
    assert messages(turns(("system", ""), *talk), SHAREGPT) == [user("a"), assistant("b")]


def test_openai_rows_are_kept_as_they_are_with_arguments_as_objects():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "2", "refusal": None},
        ],
        "tools": [{"type": "function", "function": ADD}],
    }
    assert messages(row, OPENAI) == [
        {"role": "system", "content": "be brief"},
        user("1+1?"),
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "c1", **ADD_CALL}],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c1"},
        assistant("2"),
    ]


def test_arguments_as_a_string_and_as_an_object_give_the_same_message():
    def call_with(arguments):
        call = {"function": {"name": "add", "arguments": arguments}}
        return messages({"messages": [user("x"), {"role": "assistant", "tool_calls": [call]}]}, OPENAI)[1]

    assert (
        call_with('{"a": 1}') == call_with({"a": 1}) == {"role": "assistant", "content": None, "tool_calls": [ADD_CALL]}
    )
    assert call_with("")["tool_calls"][0]["function"]["arguments"] == {}


def test_the_function_call_of_old_openai_files_is_a_tool_call():
    row = {
        "messages": [
            user("x"),
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "add", "content": "2"},
            assistant("y"),
        ]
    }
    [_, call, result, _] = messages(row, OPENAI)
    assert (call["tool_calls"], result["role"]) == ([ADD_CALL], "tool")


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"loss_weight": 0.0}])
def test_a_turn_can_be_taken_out_of_the_loss(mark):
    row = {"messages": [user("a"), {**assistant("b"), **mark}, user("c"), {**assistant("d"), "weight": 1}]}
    made = messages(row, OPENAI)
    assert (made[1], made[3]) == ({**assistant("b"), "train": False}, assistant("d"))


def test_a_text_is_one_message_that_is_all_response():
    assert messages({"text": "a"}, ALPACA, stage="pt") == [assistant("a")]
    assert messages({"instruction": "a", "input": "b", "output": "no"}, ALPACA, stage="pt") == [assistant("a\nb")]
    attr = DatasetAttr("it", "file", "x", columns=Columns("body", None, None, None, None, None, None))
    assert messages({"body": "a"}, attr, stage="pt") == [assistant("a")]
    assert align_dataset({"text": "a"}, ALPACA, stage="pt").response == [assistant("a")]


DEEP: dict[str, dict] = {}
for _ in range(2000):
    DEEP = {"x": DEEP}
CALL = ("function_call", '{"name": "add", "arguments": {}}')


@pytest.mark.parametrize(
    ("attr", "row", "reason"),
    [
        (ALPACA, {"output": "b"}, "has no column 'instruction' (it has 'output')"),
        (ALPACA, {"instruction": "a"}, "has no column 'output' (it has 'instruction')"),
        (ALPACA, {"instruction": "a", "output": " \n"}, "output is empty"),
        (ALPACA, {"instruction": "a", "output": None}, "output is empty"),
        (ALPACA, {"instruction": "", "input": "", "output": "b"}, "instruction is empty"),
        (ALPACA, {"instruction": "a", "output": 7}, "output is a number, not text"),
        (ALPACA, {"instruction": "a", "output": True}, "output is true or false, not text"),
        (ALPACA, {"instruction": ["a"], "output": "b"}, "instruction is a list, not text"),
        (ALPACA, {"instruction": "a", "output": "b\ud83d"}, "output holds half a surrogate pair"),
        (ALPACA, {"instruction": "a", "output": "b", "history": [["a"]]}, "history is not a list of pairs"),
        (ALPACA, {"instruction": "a", "output": "b", "history": [["a", ""]]}, "a turn of history is empty"),
        (ALPACA, {"instruction": "a", "output": "b", "history": "a"}, "history is not JSON"),
        (ALPACA, {"instruction": "a", "output": "b", "tools": "add"}, "tools is not JSON"),
        (
            ALPACA,
            {"instruction": "a", "output": "b", "tools": [{"type": "function"}]},
            "tools holds a tool without a name",
        ),
        (SHAREGPT, {"messages": []}, "has no column 'conversations' (it has 'messages')"),
        (SHAREGPT, {"conversations": []}, "conversations is empty"),
        (SHAREGPT, {"conversations": {"from": "human"}}, "conversations is an object, not a list"),
        (SHAREGPT, {"conversations": ["hi"]}, "conversations holds a turn that is not an object"),
        (SHAREGPT, {"conversations": [{"value": "a"}]}, "a turn has no 'from' (it has 'value')"),
        (
            SHAREGPT,
            turns(("human", "a"), ("bard", "b")),
            "has a turn of unknown role 'bard' (known: human, gpt, observation, function_call, system)",
        ),
        (SHAREGPT, turns(("human", "a"), ("human", "b")), "roles do not alternate: user after user"),
        (
            SHAREGPT,
            turns(("human", "a"), ("gpt", "b"), ("gpt", "c")),
            "roles do not alternate: assistant after assistant",
        ),
        (SHAREGPT, turns(("human", "a"), ("observation", "b")), "roles do not alternate: tool after user"),
        (SHAREGPT, turns(("gpt", "a"), ("human", "b")), "begins with assistant, not with the user"),
        (SHAREGPT, turns(("human", "a"), ("system", "b"), ("gpt", "c")), "a system message is not the first"),
        (SHAREGPT, turns(("human", "a")), "has no assistant turn"),
        (SHAREGPT, turns(("human", "a"), ("gpt", "")), "assistant turn is empty"),
        (SHAREGPT, turns(("human", ""), ("gpt", "b")), "user turn is empty"),
        (SHAREGPT, turns(("human", 3), ("gpt", "b")), "a turn's value is a number, not text"),
        (SHAREGPT, turns(("human", "a"), ("function_call", "add(1)")), "a function call is not JSON"),
        (SHAREGPT, turns(("human", "a"), ("function_call", "[]")), "a function call is empty"),
        (
            SHAREGPT,
            turns(("human", "a"), ("function_call", r'{"name": "f", "arguments": {"x": ["\ud83d"]}}')),
            "a tool call holds half a surrogate pair",
        ),
        *(
            (
                OPENAI,
                {"messages": [user("a"), {"role": "assistant", "tool_calls": [call]}]},
                "a tool call holds half a surrogate pair",
            )
            for call in (
                {"name": "f\ud83d"},
                {"name": "f", "arguments": r'{"\ud83d": 1}'},
                {"name": "f", "id": "\ud83d"},
            )
        ),
        (
            ALPACA,
            {"instruction": "a", "output": "b", "tools": [{"name": "f", "parameters": DEEP}]},
            "tools is nested too deeply",
        ),
        *(
            (ALPACA, {"instruction": "a", "output": "b", "tools": tools}, "tools holds half a surrogate pair")
            for tools in ([{"name": "f", "description": "\ud83d"}], r'[{"name": "f", "parameters": {"\ud83d": {}}}]')
        ),
        (SHAREGPT, turns(("human", "a"), ("function_call", '{"arguments": {}}')), "a tool call has no function name"),
        (OPENAI, {"messages": [user("a"), {"role": "assistant"}]}, "a turn has no 'content' (it has 'role')"),
        (OPENAI, {"messages": [user("a"), {"role": "assistant", "content": None}]}, "assistant turn is empty"),
        (
            OPENAI,
            {"messages": [user("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a"}]}]},
            "the argument text of a tool call is not JSON",
        ),
        (
            OPENAI,
            {"messages": [user("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "the arguments of a tool call are not an object",
        ),
        (OPENAI, {"messages": [{**user("a"), "tool_calls": [{"name": "f"}]}]}, "a user turn holds tool calls"),
        (
            OPENAI,
            {"messages": [user([{"type": "image_url"}]), assistant("b")]},
            "content holds a part of type 'image_url'; only text is read",
        ),
        (OPENAI, {"messages": [user("a"), {**assistant("b"), "weight": 0.5}]}, "weight of a turn is neither 0 nor 1"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(attr, row, reason):
    with pytest.raises(BadRow) as caught:
        align_dataset(row, attr)
    assert str(caught.value) == reason


@pytest.mark.parametrize("row", [{"text": ""}, {"text": " \n"}, {"text": None}])
def test_an_empty_text_is_a_bad_row(row):
    with pytest.raises(BadRow, match="text is empty"):
        align_dataset(row, ALPACA, stage="pt")


@pytest.mark.parametrize(
    ("row", "formatting", "column"),
    [
        ({"messages": [user("a"), assistant("b")]}, "openai", "messages"),
        ({"conversations": [user("a"), assistant("b")]}, "openai", "conversations"),
        (turns(("human", "a"), ("gpt", "b")), "sharegpt", "conversations"),
        ({"messages": json.dumps([user("a"), assistant("b")])}, "openai", "messages"),
    ],
)
def test_the_format_of_a_file_named_directly_is_told_from_its_first_row(row, formatting, column):
    attr = detect_formatting(row, DatasetAttr("it", "file", "x", "auto"))
    assert (attr.formatting, attr.columns.messages) == (formatting, column)
    assert messages(row, attr) == [user("a"), assistant("b")]


def test_a_file_without_conversations_is_alpaca():
    assert detect_formatting({"text": "a"}, DatasetAttr("it", "file", "x", "auto")).formatting == "alpaca"


@pytest.mark.parametrize(
    ("name", "rows", "stage"),
    [
        ("identity", 91, "sft"),
        ("alpaca_en_demo", 999, "sft"),
        ("alpaca_zh_demo", 1000, "sft"),
        ("glaive_toolcall_en_demo", 300, "sft"),
        ("glaive_toolcall_zh_demo", 300, "sft"),
        ("c4_demo", 300, "pt"),
        ("wiki_demo", 30, "pt"),
    ],
)
def test_every_row_of_llamafactorys_text_sets_aligns_under_its_own_catalog(fixture_path, name, rows, stage):
    folder = fixture_path("llamafactory-data") / "data"
    [attr] = get_dataset_list(DataArguments(dataset=[name], dataset_dir=str(folder)))
    examples = [align_dataset(row.value, attr, stage=stage) for row in read_rows(attr.path)]
    assert len(examples) == rows
    assert all(example.response[-1]["content"] for example in examples)
