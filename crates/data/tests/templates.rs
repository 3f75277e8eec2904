//! Chat templates in the styles of real models: renderings, trained spans with the stop token inside, and refusals.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;

use common::{CHATML, codec, names, trained_text, write};
use espalier_data::{ChatTemplate, EncodeOptions, Message, Row, RowError, SpansFrom};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const LLAMA3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' \
+ message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = \
bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ \
'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' \
%}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else \
%}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

const GEMMA: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}\
{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt \
%}{{'<start_of_turn>model\n'}}{% endif %}";

const PHI3: &str = "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}\
{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}\
{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}\
{% endif %}";

const ZEPHYR: &str = "{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}";

const MARKED: &str = "{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
";

fn talk() -> Vec<Message> {
    vec![
        Message::new("user", "hello world"),
        Message::new("assistant", "Grüße, 世界!"),
        Message::new("user", "more?"),
        Message::new("assistant", "No\n\nmore."),
    ]
}

fn template(text: &str) -> ChatTemplate {
    ChatTemplate::new(text, names("</s>")).unwrap()
}

#[test]
fn spans_hold_the_reply_and_its_stop_token() {
    let two = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\nGrüße, 世界!<|im_end|>\n";
    assert!(template(CHATML).render_text(&talk(), None, false).unwrap().starts_with(two));
    for (name, text, stop) in [
        ("chatml", CHATML, "<|im_end|>"),
        ("llama3", LLAMA3, "<|eot_id|>"),
        ("mistral", MISTRAL, "</s>"),
        ("gemma", GEMMA, "<end_of_turn>"),
        ("phi3", PHI3, "<|end|>"),
        ("zephyr", ZEPHYR, "</s>"),
        ("marked", MARKED, "<|im_end|>"),
    ] {
        let rendered = template(text).render(&talk(), None, false).unwrap_or_else(|e| panic!("{name}: {e}"));
        let said: Vec<&str> = rendered.spans.iter().map(|span| rendered.text[span.clone()].trim_start()).collect();
        assert_eq!(said, vec![format!("Grüße, 世界!{stop}"), format!("No\n\nmore.{stop}")], "{name}");
        let expected = if name == "marked" { SpansFrom::Generation } else { SpansFrom::Prefix };
        assert_eq!(rendered.spans_from, expected, "{name}");
        // What the model is given at inference is what stands before the span in training.
        let opened = template(text).render_text(&talk()[..3], None, true).unwrap();
        assert!(rendered.text.starts_with(&opened), "{name}");
        // The same, in tokens: the trained ones decode to the replies with their stop tokens.
        let codec = codec(Some(text));
        let example = codec.encode(&Row::Messages { messages: talk(), tools: None }).unwrap();
        let trained = trained_text(&codec, &example);
        let trained = if name == "zephyr" { trained.replace("\nGr", "Gr").replace("\nNo", "No") } else { trained };
        assert_eq!(trained, format!("Grüße, 世界!{stop}No\n\nmore.{stop}"), "{name}");
    }
}

#[test]
fn marked_and_derived_spans_agree() {
    let marked = template(MARKED).render(&talk(), None, false).unwrap();
    let derived = template(CHATML).render(&talk(), None, false).unwrap();
    assert_eq!(marked.text, derived.text);
    assert_eq!(marked.spans, derived.spans);
}

#[test]
fn white_space_alone_can_end_a_turn() {
    let plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let rendered = template(plain).render(&talk()[..2], None, false).unwrap();
    assert_eq!(&rendered.text[rendered.spans[0].clone()], "Grüße, 世界!\n");
}

#[test]
fn private_use_characters_in_the_text_survive() {
    let messages = vec![Message::new("user", "\u{E000}\u{E001}"), Message::new("assistant", "a\u{E002}b")];
    let rendered = template(MARKED).render(&messages, None, false).unwrap();
    assert!(rendered.text.contains("user\n\u{E000}\u{E001}<|im_end|>"));
    assert_eq!(&rendered.text[rendered.spans[0].clone()], "a\u{E002}b<|im_end|>");
}

#[test]
fn messages_of_weight_zero_are_not_trained() {
    let mut messages = talk();
    messages[1].extra.insert("weight".into(), json!(0));
    for text in [CHATML, MARKED] {
        let rendered = template(text).render(&messages, None, false).unwrap();
        let said: Vec<&str> = rendered.spans.iter().map(|span| &rendered.text[span.clone()]).collect();
        assert_eq!(said, vec!["No\n\nmore.<|im_end|>"]);
    }
}

#[test]
fn a_template_that_rewrites_the_past_is_refused_by_name() {
    let text = "{% for m in messages %}{% if loop.last %}{{ m.role + m.content + '!' }}{% else %}{{ m.role }};{% endif %}{% endfor %}";
    let error = template(text).render(&talk(), None, false).unwrap_err();
    assert_eq!(error.reason(), "no_trained_span");
    assert!(error.to_string().contains("{% generation %}"), "{error}");
    // Without spans it still renders, and everything can be trained.
    let codec = codec(Some(text)).with_options(EncodeOptions { completion_only: false, ..Default::default() });
    assert!(codec.encode(&Row::Messages { messages: talk(), tools: None }).unwrap().trained_tokens() > 0);
}

#[test]
fn the_template_refuses_in_its_own_words() {
    let error = template(MISTRAL).render(&talk()[1..], None, false).unwrap_err().to_string();
    assert!(error.contains("Conversation roles must alternate"), "{error}");
    let error = template(GEMMA).render(&[Message::new("system", "x")], None, false).unwrap_err().to_string();
    assert!(error.contains("System role not supported"), "{error}");
    let error = template("{% for m in messages %}{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}")
        .render_text(&talk(), None, false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("runs without end"), "{error}");
    let error = ChatTemplate::new("{% for m in %}", BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains("chat template: default"), "{error}");
    let error = ChatTemplate::new("{% generation %}x", BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains("do not pair up"), "{error}");
}

#[test]
fn python_methods_loop_controls_and_json_spelling() {
    let text = "{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}
{%- if m.content.startswith('skip') -%}{%- continue -%}{%- endif -%}
{%- if m.role == 'stop' -%}{%- break -%}{%- endif -%}
{%- set ns.n = ns.n + 1 -%}
{{ m.content.strip().upper().split(' ')[0] }}|
{%- for k, v in m.items() -%}{{ k }},{%- endfor -%};
{%- endfor -%}
{{ ns.n }} {{ messages[0] | tojson }} {{ {'b': [1, 2.0, true, none], 'a': \"é<'&\"} | tojson(indent=2) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}";
    let messages = vec![
        Message::new("user", " hi there "),
        Message::new("user", "skip"),
        Message::new("stop", "x"),
        Message::new("user", "y"),
    ];
    let out = template(text).render_text(&messages, None, false).unwrap();
    assert_eq!(
        out,
        "HI|role,content,;1 {\"role\": \"user\", \"content\": \" hi there \"} {\n  \"b\": [\n    1,\n    2.0,\n    true,\n    null\n  ],\n  \
         \"a\": \"é<'&\"\n} {\"a\": 2, \"b\": 1}"
    );
}

#[test]
fn containers_are_written_as_python_does() {
    let text = r#"{{ [1, 2.0, none, true, 'a', "it's", 'a"b', 'x\\y'] }} {{ {'k': ['é\n']} }} {{ [1, 'a'] | string }} {{ 'plain' | string }}"#;
    let expected = r#"[1, 2.0, None, True, 'a', "it's", 'a"b', 'x\\y'] {'k': ['é\n']} [1, 'a'] plain"#;
    assert_eq!(template(text).render_text(&talk(), None, false).unwrap(), expected);
}

#[test]
fn templates_with_foreign_line_ends_render_line_feeds() {
    let plain = template(ZEPHYR).render(&talk(), None, true).unwrap();
    let lines = "{%- for m in messages %}\n{{ m.role }}:\n{{ m.content }}\n{%- endfor %}\n";
    let expected = template(lines).render_text(&talk(), None, false).unwrap();
    for end in ["\r\n", "\r"] {
        assert_eq!(template(&ZEPHYR.replace('\n', end)).render(&talk(), None, true).unwrap(), plain);
        assert_eq!(template(&lines.replace('\n', end)).render_text(&talk(), None, false).unwrap(), expected);
    }
}

#[test]
fn dates_come_from_the_clock() {
    let mut template = template("{{ strftime_now('%d %b %Y|%A %j|%-d %B %y|%H:%M:%S %I%p%%') }}");
    for (clock, expected) in [
        (0, "01 Jan 1970|Thursday 001|1 January 70|00:00:00 12AM%"),
        (951_827_696, "29 Feb 2000|Tuesday 060|29 February 00|12:34:56 12PM%"),
        (1_735_603_200, "31 Dec 2024|Tuesday 366|31 December 24|00:00:00 12AM%"),
    ] {
        template.set_clock(clock);
        assert_eq!(template.render_text(&talk(), None, false).unwrap(), expected);
    }
}

#[test]
fn tools_reach_the_template_or_refuse_the_row() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let shows = "{% if tools is not none %}{{ tools[0].function.name }}{% endif %}{{ messages[0].content }}";
    assert_eq!(template(shows).render_text(&talk(), Some(&tools), false).unwrap(), "fhello world");
    assert_eq!(template(shows).render_text(&talk(), None, false).unwrap(), "hello world");
    let error = template(CHATML).render_text(&talk(), Some(&tools), false).unwrap_err();
    assert_eq!(error.reason(), "unsupported");
    let mut call = Message::new("assistant", "");
    call.extra = Map::from_iter([("tool_calls".to_string(), json!([{"function": {"name": "f", "arguments": {}}}]))]);
    let error = template(CHATML).render_text(&[call.clone()], None, false).unwrap_err();
    assert!(matches!(error, RowError::Unsupported(_)));
    let calls =
        "{% for c in messages[0].tool_calls %}{{ messages[0].content is none }} {{ c.function.name }}{% endfor %}";
    assert_eq!(template(calls).render_text(&[call], None, false).unwrap(), "True f");
}

#[test]
fn folders_give_their_template() {
    let folder = TempDir::new().unwrap();
    let read = || ChatTemplate::from_folder(folder.path(), names("</s>"));
    assert!(read().unwrap().is_none());
    write(folder.path(), "tokenizer_config.json", json!({"chat_template": "config {{ eos_token }}"}).to_string());
    assert_eq!(read().unwrap().unwrap().render_text(&talk(), None, false).unwrap(), "config </s>");
    let list = json!({"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools }} tools"}]});
    write(folder.path(), "tokenizer_config.json", list.to_string());
    assert_eq!(read().unwrap().unwrap().render_text(&talk(), None, false).unwrap(), "plain");
    let used = read().unwrap().unwrap().render_text(&talk(), Some(&json!([1])), false).unwrap();
    assert_eq!(used, "[1] tools");
    write(
        folder.path(),
        "tokenizer_config.json",
        json!({"chat_template": [{"name": "rag", "template": "x"}]}).to_string(),
    );
    assert!(read().unwrap_err().to_string().contains("none named default"));
    write(folder.path(), "chat_template.jinja", "file");
    assert_eq!(read().unwrap().unwrap().source(), "file");
    std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
    write(folder.path(), "tokenizer_config.json", "{\n broken");
    let error = read().unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json:2: invalid JSON"), "{error}");
}

#[test]
fn message_keys_reach_the_template_in_order() {
    let message: Message = serde_json::from_value(json!({"role": "user", "content": "c", "z": 1, "a": 2})).unwrap();
    let view: Value =
        serde_json::from_str(&template("{{ messages[0] | tojson }}").render_text(&[message], None, false).unwrap())
            .unwrap();
    assert_eq!(view.as_object().unwrap().keys().collect::<Vec<_>>(), vec!["role", "content", "z", "a"]);
}
