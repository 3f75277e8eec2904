//! Files of every kind, sound and damaged: rows, line numbers, and no panic on arbitrary bytes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;

use common::write;
use espalier_data::{DataError, DataOptions, Label, Message, Row, RowError, Source, TextUnit};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn rows(name: &str, content: impl AsRef<[u8]>, options: DataOptions) -> Vec<Result<(u64, Row), DataError>> {
    let folder = TempDir::new().unwrap();
    let path = write(folder.path(), name, content);
    Source::open(path, options).unwrap().rows().map(|row| row.map(|(location, row)| (location.line, row))).collect()
}

fn row(value: Value) -> Result<Row, RowError> {
    Row::from_value(value, &DataOptions::default())
}

fn text(text: &str) -> Row {
    Row::Text { text: text.into() }
}

#[test]
fn json_lines_keep_line_numbers_past_bad_rows() {
    let content =
        "\u{feff}{\"text\": \"a\"}\r\n\n{\"text\": \"b\"\n{\"txt\": \"c\", \"id\": 3}\n[1]\n{\"text\": \"d\"}";
    let rows = rows("a.jsonl", content, DataOptions::default());
    assert_eq!(rows.len(), 5);
    assert_eq!(rows[0].as_ref().unwrap(), &(1, text("a")));
    let error = rows[1].as_ref().unwrap_err().to_string();
    assert!(error.contains("a.jsonl:3: invalid JSON: EOF"), "{error}");
    let error = rows[2].as_ref().unwrap_err().to_string();
    assert!(
        error.contains("a.jsonl:4") && error.contains("[txt, id]") && error.contains("prompt + completion"),
        "{error}"
    );
    assert!(rows[3].as_ref().unwrap_err().to_string().contains("a.jsonl:5: a row must be an object"));
    assert_eq!(rows[4].as_ref().unwrap(), &(6, text("d")));
}

#[test]
fn bytes_that_are_not_utf8_name_line_and_place() {
    for (name, bad) in
        [("a.jsonl", &b"{\"text\": \"x\"}\n{\"text\": \"\xff\"}\n{\"text\": \"y\"}\n"[..]), ("a.txt", b"x\n\xff\ny\n")]
    {
        let rows = rows(name, bad, DataOptions::default());
        assert_eq!(rows.len(), 3);
        let error = rows[1].as_ref().unwrap_err();
        assert!(matches!(error, DataError::Row { problem: RowError::Utf8 { .. }, .. }), "{error}");
        assert!(error.to_string().contains(&format!("{name}:2: not UTF-8")), "{error}");
        assert_eq!(rows[2].as_ref().unwrap().1, text("y"));
    }
}

#[test]
fn json_lists_and_object_sequences() {
    let list = "[\n {\"text\": \"a ] } \\\" ,\"},\n\n {\"text\":\n\"b\"}, {\"text\": 1}, 7\n]\n";
    let got = rows("a.json", list, DataOptions::default());
    assert_eq!(got.len(), 4);
    assert_eq!(got[0].as_ref().unwrap(), &(2, text("a ] } \" ,")));
    assert_eq!(got[1].as_ref().unwrap(), &(4, text("b")));
    assert!(got[2].as_ref().unwrap_err().to_string().contains("text: expected a string, found the number 1"));
    assert!(got[3].as_ref().unwrap_err().to_string().contains("a.json:5: a row must be an object"));
    let sequence = rows("b.json", "{\"text\": \"a\"}\n{\"text\": \"b\"}", DataOptions::default());
    assert_eq!(sequence.into_iter().map(Result::unwrap).collect::<Vec<_>>(), vec![(1, text("a")), (2, text("b"))]);
    assert!(rows("c.json", "[]", DataOptions::default()).is_empty());
}

#[test]
fn damaged_json_ends_with_one_error() {
    for (content, says) in [
        ("[{\"text\": \"a\"},\n{\"text\": \"b\"", "a.json:2: the file ends inside the row that begins on line 2"),
        ("[{\"text\": \"a\"},\n", "a.json:2: the file ends before the ]"),
        ("[{\"text\": \"a\"}\n{\"text\": \"b\"}]", "a.json:2: expected , or ]"),
        ("[{\"text\": \"a\"},]", "a.json:1: a comma without a row"),
        ("[{\"text\": \"a\"}] x", "behind the end of the list"),
        ("{\"text\": \"a\"} x", "expected the next object"),
    ] {
        let rows = rows("a.json", content, DataOptions::default());
        assert_eq!(rows.len(), 2, "{content}");
        assert!(rows[0].is_ok());
        let error = rows[1].as_ref().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let error = rows("a.json", "nonsense", DataOptions::default()).remove(0).unwrap_err().to_string();
    assert!(error.contains("must begin with [ or {"), "{error}");
}

#[test]
fn tables_with_quotes_and_ragged_rows() {
    let content = "\u{feff}text,label\n\"a, \"\"b\"\"\nc\",pos\nd\nd,e,f\ng,1\n";
    let rows = rows("a.csv", content, DataOptions::default());
    assert_eq!(rows.len(), 4);
    let class = |text: &str, name: &str| Row::Classification {
        text: text.into(),
        text_pair: None,
        label: Label::Name(name.into()),
    };
    assert_eq!(rows[0].as_ref().unwrap(), &(2, class("a, \"b\"\nc", "pos")));
    assert!(rows[1].as_ref().unwrap_err().to_string().contains("a.csv:4: 1 cells where the header has 2"));
    assert!(rows[2].as_ref().unwrap_err().to_string().contains("a.csv:5: 3 cells"));
    assert_eq!(rows[3].as_ref().unwrap(), &(6, class("g", "1")));
}

#[test]
fn tab_tables_json_cells_and_header_faults() {
    let tsv = rows(
        "a.tsv",
        "messages\tid\n\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"hi\"\"}]\"\t1\n",
        DataOptions::default(),
    );
    let expected = Row::Messages { messages: vec![Message::new("user", "hi")], tools: None };
    assert_eq!(tsv.into_iter().next().unwrap().unwrap().1, expected);
    let error = rows("b.csv", "text,text\na,b\n", DataOptions::default()).remove(0).unwrap_err().to_string();
    assert!(error.contains("b.csv:1: two columns are named \"text\""), "{error}");
}

#[test]
fn text_by_line_paragraph_separator_and_file() {
    let content = "one\n  \ntwo\nthree\n\n\nfour\n";
    let by = |unit, separator: Option<&str>| {
        let options =
            DataOptions { text_unit: unit, text_separator: separator.map(str::to_string), ..Default::default() };
        rows("a.txt", content, options).into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    assert_eq!(
        by(TextUnit::Line, None),
        vec![(1, text("one")), (3, text("two")), (4, text("three")), (7, text("four"))]
    );
    assert_eq!(by(TextUnit::Paragraph, None), vec![(1, text("one")), (3, text("two\nthree")), (7, text("four"))]);
    assert_eq!(by(TextUnit::Paragraph, Some("three")), vec![(1, text("one\n  \ntwo")), (7, text("four"))]);
    assert_eq!(by(TextUnit::File, None), vec![(1, text("one\n  \ntwo\nthree\n\n\nfour"))]);
}

#[test]
fn parquet_round_trip() {
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.parquet");
    let schema = "message rows { required binary text (UTF8); optional int64 label; required binary image; \
        optional group input_ids (LIST) { repeated group list { required int64 element; } } }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let codec = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
    let mut file = SerializedFileWriter::new(std::fs::File::create(&path).unwrap(), schema, Arc::new(codec)).unwrap();
    let mut group = file.next_row_group().unwrap();
    let text_bytes: Vec<ByteArray> = ["Grüße", "two", "three"].into_iter().map(ByteArray::from).collect();
    let images: Vec<ByteArray> = (0..3).map(|_| ByteArray::from(vec![0xff, 0xfe])).collect();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&text_bytes, None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[0, 1], Some(&[1, 0, 1]), None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&images, None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[5, 6, 7], Some(&[2, 2, 0, 2]), Some(&[0, 1, 0, 0])).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();

    let source = Source::open(&path, DataOptions::default()).unwrap();
    let records: Vec<Value> = source.records().map(|r| r.unwrap().1).collect();
    assert_eq!(records[0], json!({"text": "Grüße", "label": 0, "image": null, "input_ids": [5, 6]}));
    assert_eq!(records[1], json!({"text": "two", "label": null, "image": null, "input_ids": null}));
    assert_eq!(records[2]["input_ids"], json!([7]));
    let by_text = DataOptions { text_column: Some("text".into()), ..Default::default() };
    let rows: Vec<Row> = Source::open(&path, by_text).unwrap().rows().map(|r| r.unwrap().1).collect();
    assert_eq!(rows, vec![text("Grüße"), text("two"), text("three")]);

    let whole = std::fs::read(&path).unwrap();
    for cut in [3, whole.len() / 2, whole.len() - 1] {
        let path = write(folder.path(), "cut.parquet", &whole[..cut]);
        let error = Source::open(path, DataOptions::default()).unwrap().rows().next().unwrap().unwrap_err().to_string();
        assert!(error.contains("cut.parquet:1: not a whole Parquet file"), "{error}");
    }
}

#[test]
fn kinds_of_rows_by_their_keys() {
    let pair =
        |prompt: &str, completion: &str| Row::PromptCompletion { prompt: prompt.into(), completion: completion.into() };
    assert_eq!(row(json!({"prompt": "a", "completion": "b", "text": "c"})).unwrap(), pair("a", "b"));
    assert_eq!(
        row(json!({"instruction": "a", "input": "", "output": "b", "answer": "x"})).unwrap(),
        pair("a\n\n", "b")
    );
    assert_eq!(row(json!({"instruction": "a", "input": "i", "output": "b"})).unwrap(), pair("a\n\ni\n\n", "b"));
    assert_eq!(row(json!({"instruction": "a", "context": "c", "response": "b"})).unwrap(), pair("a\n\nc\n\n", "b"));
    assert_eq!(row(json!({"question": "a", "answer": "b", "choices": [], "context": ""})).unwrap(), pair("a\n\n", "b"));
    assert_eq!(row(json!({"question": "a", "answer": "b"})).unwrap(), pair("a\n\n", "b"));
    assert_eq!(row(json!({"inputs": "a", "targets": "b"})).unwrap(), pair("a", "b"));
    let share =
        json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "s"});
    let messages = vec![Message::new("system", "s"), Message::new("user", "q"), Message::new("assistant", "r")];
    assert_eq!(row(share).unwrap(), Row::Messages { messages, tools: None });
    let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]});
    assert_eq!(row(parts).unwrap(), Row::Messages { messages: vec![Message::new("user", "ab")], tools: None });
    let nli = json!({"premise": "p", "hypothesis": "h", "label": 2});
    let expected = Row::Classification { text: "p".into(), text_pair: Some("h".into()), label: Label::Index(2) };
    assert_eq!(row(nli).unwrap(), expected);
    let tokens = row(json!({"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]})).unwrap();
    let expected = Row::Tokens { input_ids: vec![1, 2], labels: Some(vec![-100, 2]), attention_mask: Some(vec![1, 1]) };
    assert_eq!(tokens, expected);
    assert!(matches!(
        row(json!({"prompt": "a", "chosen": "b", "rejected": "c"})).unwrap(),
        Row::Preference { prompt: Some(_), .. }
    ));
    // A conversation cut in two trains only its second part.
    let Row::Messages { messages, .. } = row(json!({
        "prompt": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
        "completion": [{"role": "assistant", "content": "c"}]
    }))
    .unwrap() else {
        panic!("not a conversation")
    };
    assert_eq!(messages.iter().map(Message::is_trained).collect::<Vec<_>>(), vec![false, false, true]);
}

#[test]
fn columns_by_name_win() {
    let options =
        DataOptions { prompt_column: Some("q".into()), completion_column: Some("a".into()), ..Default::default() };
    let value = json!({"q": "1", "a": "2", "text": "3"});
    let expected = Row::PromptCompletion { prompt: "1".into(), completion: "2".into() };
    assert_eq!(Row::from_value(value.clone(), &options).unwrap(), expected);
    let options = DataOptions { prompt_column: Some("nope".into()), ..Default::default() };
    let error = Row::from_value(value, &options).unwrap_err().to_string();
    assert!(error.contains("\"nope\" is absent or null; the row has [q, a, text]"), "{error}");
    let options = DataOptions { label_column: Some("kind".into()), ..Default::default() };
    let got = Row::from_value(json!({"sentence": "s", "kind": true}), &options).unwrap();
    assert_eq!(got, Row::Classification { text: "s".into(), text_pair: None, label: Label::Index(1) });
    assert!(serde_json::from_str::<DataOptions>("{\"text_colum\": \"a\"}").is_err());
}

#[test]
fn rows_that_would_lose_something_are_refused() {
    for value in [
        json!({"question": "q", "answer": "A", "choices": ["a", "b"]}),
        json!({"instruction": "i", "output": "o", "history": [["a", "b"]]}),
        json!({"question": "q", "answer": "yes", "contexts": ["evidence"]}),
        json!({"inputs": "q", "targets": "t", "Passage": "p"}),
        json!({"instruction": "i", "input": "x", "context": "y", "output": "o"}),
        json!({"prompt": "p", "completion": "c", "system": "s"}),
        json!({"messages": [{"role": "user", "content": "a"}], "label": false}),
    ] {
        assert_eq!(row(value).unwrap_err().reason(), "unsupported");
    }
    assert_eq!(row(json!({"text": "a", "label": null})).unwrap_err().reason(), "missing_key");
    assert_eq!(row(json!({"messages": []})).unwrap_err().reason(), "wrong_type");
    assert_eq!(row(json!({"messages": [{"role": "user"}]})).unwrap_err().reason(), "wrong_type");
    assert_eq!(row(json!({"conversations": [{"from": "martian", "value": "x"}]})).unwrap_err().reason(), "wrong_type");
    assert_eq!(row(json!({"input_ids": [1.5]})).unwrap_err().reason(), "wrong_type");
    assert_eq!(row(json!({"input_ids": [-1]})).unwrap_err().reason(), "token_id_out_of_range");
}

#[test]
fn folders_limits_and_missing_files() {
    let folder = TempDir::new().unwrap();
    write(folder.path(), "b.jsonl", "{\"text\": \"2\"}\n{\"text\": \"3\"}\n");
    write(folder.path(), "a.txt", "1\n");
    write(folder.path(), "README.md", "no data");
    let all: Vec<Row> =
        Source::open(folder.path(), DataOptions::default()).unwrap().rows().map(|r| r.unwrap().1).collect();
    assert_eq!(all, vec![text("1"), text("2"), text("3")]);
    let limited = DataOptions { limit: Some(2), ..Default::default() };
    assert_eq!(Source::open(folder.path(), limited).unwrap().rows().count(), 2);
    let error = Source::open(folder.path().join("none.jsonl"), DataOptions::default()).unwrap_err().to_string();
    assert!(error.contains("none.jsonl"), "{error}");
    let error = Source::open(folder.path().join("README.md"), DataOptions::default()).unwrap_err().to_string();
    assert!(error.contains(".parquet"), "{error}");
    std::fs::remove_file(folder.path().join("a.txt")).unwrap();
    std::fs::remove_file(folder.path().join("b.jsonl")).unwrap();
    let error = Source::open(folder.path(), DataOptions::default()).unwrap_err().to_string();
    assert!(error.contains("a folder with only README.md"), "{error}");
}

#[test]
fn class_names_are_collected_in_order() {
    let folder = TempDir::new().unwrap();
    let path = write(folder.path(), "a.csv", "text,label\na,pos\nb,neg\nc,pos\n");
    let names = Source::open(path, DataOptions::default()).unwrap().label_names().unwrap();
    assert_eq!(names, Some(vec!["neg".to_string(), "pos".to_string()]));
    let path = write(folder.path(), "b.csv", "text,label\na,1\nb,0\n");
    assert_eq!(Source::open(path, DataOptions::default()).unwrap().label_names().unwrap(), None);
}

/// JSON values of every shape, with the keys that rows are known by.
fn any_json() -> impl Strategy<Value = Value> {
    let key = prop::sample::select(vec![
        "messages",
        "role",
        "content",
        "from",
        "value",
        "prompt",
        "completion",
        "text",
        "label",
        "input_ids",
        "labels",
        "chosen",
        "rejected",
        "instruction",
        "input",
        "output",
        "tools",
        "attention_mask",
        "premise",
        "hypothesis",
        "tool_calls",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        Just(Value::from("[1,")),
    ];
    leaf.prop_recursive(4, 32, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..5)
                .prop_map(|entries| Value::Object(entries.into_iter().map(|(k, v)| (k.to_string(), v)).collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn arbitrary_bytes_end_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), kind in 0usize..6) {
        let name = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt"][kind];
        let n = rows(name, &bytes, DataOptions::default()).len();
        prop_assert!(n <= bytes.len() + 1);
    }

    #[test]
    fn json_like_text_ends_without_panic(text in "[\\[\\]{},:\"\\\\a1 \n]{0,80}", kind in 0usize..4) {
        let name = ["a.jsonl", "a.json", "a.csv", "a.txt"][kind];
        let n = rows(name, &text, DataOptions::default()).len();
        prop_assert!(n <= text.len() + 1);
    }

    #[test]
    fn arbitrary_json_ends_without_panic(value in any_json()) {
        let _ = row(value);
    }

    #[test]
    fn lists_and_lines_agree(texts in prop::collection::vec(".{0,20}", 0..8), indent in any::<bool>()) {
        let values: Vec<Value> = texts.iter().map(|t| json!({"text": t})).collect();
        let lines: String = values.iter().map(|v| format!("{v}\n")).collect();
        let list = if indent { serde_json::to_string_pretty(&values).unwrap() } else { serde_json::to_string(&values).unwrap() };
        let of = |name: &str, content: &str| -> Vec<Row> {
            rows(name, content, DataOptions::default()).into_iter().map(|r| r.unwrap().1).collect()
        };
        prop_assert_eq!(of("a.jsonl", &lines), of("a.json", &list));
    }
}
