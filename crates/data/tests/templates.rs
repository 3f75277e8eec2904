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

/// A template that takes the reasoning out of past turns.
const FORGETFUL: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}\
{{ m.content.split('</think>') | last }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}\
<|im_start|>assistant\n{% endif %}";

#[test]
fn a_template_that_forgets_reasoning_has_its_last_turn_trained() {
    let mut messages = talk();
    messages[1].content = "<think>hm</think>Grüße".into();
    messages[3].content = "<think>so</think>No.".into();
    let rendered = template(FORGETFUL).render(&messages, None, false).unwrap();
    assert_eq!(rendered.spans_from, SpansFrom::LastTurn);
    assert!(!rendered.text.contains("hm"));
    let said: Vec<&str> = rendered.spans.iter().map(|span| &rendered.text[span.clone()]).collect();
    assert_eq!(said, ["<think>so</think>No.<|im_end|>"]);
    // Where nothing was forgotten, all turns are trained.
    assert_eq!(template(FORGETFUL).render(&talk(), None, false).unwrap().spans.len(), 2);
    let folder = TempDir::new().unwrap();
    let rows = json!({"messages": messages}).to_string() + "\n" + &json!({"messages": talk()}).to_string() + "\n";
    let path = write(folder.path(), "a.jsonl", rows);
    let source = espalier_data::Source::open(path, Default::default()).unwrap();
    let codec = codec(None).with_template(ChatTemplate::new(FORGETFUL, names("</s>")).unwrap());
    let codec = codec.with_options(EncodeOptions { allow_no_stop: true, ..Default::default() });
    let store = espalier_data::TokenStore::build(&source, &codec, None).unwrap();
    assert_eq!(store.report().last_turn_only, 1);
    assert!(
        store.report().notes.iter().any(|note| note.contains("1 of 2 answers are trained in their last turn only"))
    );
}

#[test]
fn what_a_template_builds_is_bounded() {
    let doubled = "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}";
    for (name, text) in [
        ("plus", doubled.to_owned()),
        ("tilde", doubled.replace(" + ", " ~ ")),
        ("times", doubled.replace("ns.x + ns.x", "ns.x * 16")),
        ("times the other way", doubled.replace("ns.x + ns.x", "16 * ns.x")),
        ("a list, times", "{{ ([1] * 100000 * 100000) | length }}".to_owned()),
        ("join", doubled.replace("ns.x + ns.x", "[ns.x, ns.x] | join")),
        ("join as a method", doubled.replace("ns.x + ns.x", "ns.x.join([ns.x, ns.x, ns.x])")),
        ("replace", doubled.replace("ns.x + ns.x", "ns.x | replace('a', ns.x)")),
        ("replace as a method", doubled.replace("ns.x + ns.x", "ns.x.replace('a', ns.x)")),
        ("format", doubled.replace("ns.x + ns.x", "'%s%s' | format(ns.x, ns.x)")),
        ("format as a method", doubled.replace("ns.x + ns.x", "'{}{}'.format(ns.x, ns.x)")),
        ("a wide format", "{{ '%999999999d' | format(3) }}".to_owned()),
        ("a wide indent", "{{ 'a' | indent(999999999, true) }}".to_owned()),
        ("a wide indent by name", "{{ 'a\nb' | indent(width=999999999) }}".to_owned()),
        ("a wide tojson", "{{ [1] | tojson(indent=999999999) }}".to_owned()),
        ("capture", "{% set x = 'ab' %}{% set ns = namespace(x=x) %}{% for i in range(40) %}{% set y %}{{ ns.x }}{{ ns.x }}\
            {% endset %}{% set ns.x = y %}{% endfor %}".to_owned()),
        ("output", format!("{{% for i in range(100000) %}}{}{{% endfor %}}", "x".repeat(1000))),
        ("raw capture", format!("{{% set y %}}{{% for i in range(100000) %}}{}{{% endfor %}}{{% endset %}}", "x".repeat(1000))),
        ("a macro", "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='ab') %}{% for i in range(40) %}\
            {% set ns.x = m(ns.x) %}{% endfor %}".to_owned()),
        ("copies in a list", "{% set x = 'ab' * 100000 %}{% set ns = namespace(l=[]) %}{% for i in range(100000) %}\
            {% set ns.l = ns.l + [x ~ i] %}{% endfor %}".to_owned()),
        ("slices in a list", "{% set x = 'ab' * 100000 %}{% set ns = namespace(l=[]) %}{% for i in range(100000) %}\
            {% set ns.l = ns.l + [x[1:]] %}{% endfor %}".to_owned()),
        ("laughs", "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}".to_owned()),
        ("laughs as JSON", "{% set ns = namespace(x=[1]) %}{% for i in range(25) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}\
            {% endfor %}{{ ns.x | tojson }}".to_owned()),
        ("a deep list", "{% set ns = namespace(x=[1]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}".to_owned()),
        ("a deep dictionary", "{% set ns = namespace(x=1) %}{% for i in range(100000) %}{% set ns.x = dict(a=ns.x) %}{% endfor %}".to_owned()),
        ("a namespace in itself", "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".to_owned()),
        ("a namespace in its list", "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}".to_owned()),
        ("upper case of many", "{% set x = 'ab' * 1000000 %}{{ ([x] * 1000) | map('upper') | list | length }}".to_owned()),
        ("a recursive loop", "{% for x in [[[1]]] recursive %}{{ 'a' * 9000000 }}{% if x is iterable %}{{ loop(x) }}{% endif %}{% endfor %}\
            {{ 'a' * 9000000 }}{{ 'a' * 9000000 }}".to_owned()),
        ("a long chain", format!("{{{{ x{} }}}}", "+x".repeat(100_000))),
        ("a long chain of filters", format!("{{{{ x{} }}}}", " | e".repeat(100_000))),
        ("many branches", format!("{{% if x %}}{}{{% endif %}}", "{% elif x %}".repeat(100_000))),
        ("constants, times", "{{ ('a' * 9999 * 9999) | length }}{{ ('b' * 9999 * 9999) | length }}".to_owned()),
        ("another template", "{% include 'default' %}".to_owned()),
        ("its meter", "{% set espalier_meter = 3 %}{{ 'a' ~ 'b' }}".to_owned()),
    ] {
        let began = std::time::Instant::now();
        let made = ChatTemplate::new(&text, names("</s>"));
        let failed = match made {
            Ok(template) => template.render_text(&talk(), None, false).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        assert!(failed.as_ref().is_err_and(|e| e.contains("template")), "{name}: {:?}", failed.map(|t| t.len()));
        assert!(began.elapsed().as_secs() < 20, "{name}: {:?}", began.elapsed());
    }
    assert!(peak_megabytes().is_none_or(|peak| peak < 600), "{:?}", peak_megabytes());
}

/// Highest memory of this process, where the system tells.
fn peak_megabytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

#[test]
fn counting_changes_no_result() {
    let messages = talk();
    for (text, expected) in [
        (
            "{{ 3 * 4 }} {{ 2.5 * 2 }} {{ true * 2 }} {{ 'ab' * 3 }} {{ 2 * [1, 'x'] }}",
            "12 5.0 2 ababab [1, 'x', 1, 'x']",
        ),
        ("{{ 'a' ~ 1 ~ none }} {{ 1 + 2 }} {{ [1] + [2, 3] }} {{ ([1, 2] + [3]) | length }}", "a1None 3 [1, 2, 3] 3"),
        ("{{ 'hello'[1:3] }} {{ 'hello'[::-1] }} {{ messages[::-1][0].content }}", "el olleh No\n\nmore."),
        (
            "{{ 'a-b' | replace('-', '+') }} {{ 'a-b'.replace('-', '') }} {{ ', '.join(['x', 'y']) }} {{ ['x', 'y'] | join('/') }}",
            "a+b ab x, y x/y",
        ),
        (
            "{{ 'hello'[-3:-1] }} {{ 'hello'[4:1:-2] }} {{ [1, 2, 3][1:] }} {{ [1, 2, 3][-9:9:2] }} {{ 'a'[5:] }}|",
            "ll ol [2, 3] [1, 3] |",
        ),
        ("{{ messages | map(attribute='role') | join(' ') }}", "user assistant user assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ 'a b'.split(' ')[1] }}", "2 b"),
        ("{{ 'x\ny' | indent(2) }} {{ '%s-%02d' | format('a', 5) }} {{ '{}:{}'.format(1, 'b') }}", "x\n  y a-05 1:b"),
        ("{% macro m(a, b='z') %}[{{ a }}{{ b }}]{% endmacro %}{{ m('x') }}{{ m('x', b='y') }}", "[xz][xy]"),
        (
            "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% else %}none{% endfor %}",
            "023",
        ),
        ("{% for i in [] %}x{% else %}none{% endfor %}", "none"),
        (
            "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
            "1(2(3))",
        ),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "4"),
        (
            "{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}{{ 'b' in x and 'c' not in x }}{{ x if x == 'a1b' else 'no' }}",
            "A1BTruea1b",
        ),
        (
            "{% filter upper %}abc{% endfilter %}{% block one %}b{% endblock %}{% with a = 3 %}{{ a }}{% endwith %}",
            "ABCb3",
        ),
        (
            "{{ {'a': 1, 'b': [1, 2]} | tojson }}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
            "{\"a\": 1, \"b\": [1, 2]}a1",
        ),
        (
            "{{ 1 if undefined_name is not defined else 2 }}{{ undefined_name or 'd' }}{{ ('' ~ undefined_name) | length }}",
            "1d0",
        ),
        ("{{ 'aXbX'.count('X') }}{{ 'ab'.count('') }}{{ ''[::-1] | length }}", "230"),
    ] {
        let rendered = template(text).render_text(&messages, None, false);
        assert_eq!(rendered.as_deref(), Ok(expected), "{text}");
    }
}
