//! Well-formed inputs to start from: golden files, and small ones made here.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use espalier_adapters::MethodConfig;
use espalier_adapters::formats::folder::WEIGHTS_FILE;
use espalier_data::SHIPPED;
use espalier_train::Recipe;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};

use crate::{chat, root};

pub(super) const HEADER_WORDS: &[&str] = &[
    "\"__metadata__\"",
    "\"data_offsets\"",
    "\"shape\"",
    "\"dtype\"",
    "\"BF16\"",
    "[0,0]",
    "18446744073709551615",
    "-1",
    "null",
    "{}",
];
pub(super) const CONFIG_WORDS: &[&str] = &[
    "\"r\"",
    "\"lora_alpha\"",
    "\"target_modules\"",
    "\"(a*)*b\"",
    "\".*\"",
    "\"rank_pattern\"",
    "\"alpha_pattern\"",
    "1e308",
    "NaN",
    "\"modules_to_save\"",
    "\"trainable_token_indices\"",
    "65536",
    "true",
    "null",
    "[]",
    "{}",
    "\"layers_to_transform\"",
];
pub(super) const GGUF_WORDS: &[&str] =
    &["general.alignment", "general.architecture", "llama.block_count", "token_embd.weight", "GGUF"];
pub(super) const TOKENIZER_WORDS: &[&str] = &[
    "\"BPE\"",
    "\"WordPiece\"",
    "\"Unigram\"",
    "\"WordLevel\"",
    "\"ByteLevel\"",
    "\"Sequence\"",
    "\"Split\"",
    "\"Regex\"",
    "\"(a*)*b\"",
    "\"normalizer\"",
    "\"Replace\"",
    "\"Prepend\"",
    "\"Metaspace\"",
    "\"TemplateProcessing\"",
    "\"Precompiled\"",
    "\"added_tokens\"",
    "\"unk_id\"",
    "4294967295",
    "null",
    "\"\"",
];
pub(super) const TEMPLATE_WORDS: &[&str] = &[
    "{% for x in range(99999) %}",
    "{% endfor %}",
    "{{ x * 99999 }}",
    "{{ messages | tojson }}",
    "{% set ns = namespace(x='a') %}",
    "{% set ns.x = ns.x ~ ns.x %}",
    "{% set ns.x = [ns.x] %}",
    "[::-1]",
    "[-9223372036854775808:]",
    " | join",
    ".split('')",
    ".count('')",
    " | replace('', 'aa')",
    " | indent(99999)",
    "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "recursive",
    "loop(x)",
    "**99",
    "{% generation %}",
    "{% endgeneration %}",
    "{% include 'default' %}",
    "{% block a %}{{ super() }}{% endblock %}",
    " | map('upper')",
    " | format",
    "'%99999d'",
    "loop.index0",
    "caller()",
    "{% raw %}",
    "{#",
    "-%}",
    "| list | sort",
    "strftime_now('%Y')",
    " is defined",
    " | batch(3)",
    "9223372036854775807",
    " // 0",
    " % 0",
    ".format(1)",
    "'{:>99999}'",
    " | tojson(indent=99)",
    "self.a()",
    "{% break %}",
];
pub(super) const RECIPE_WORDS: &[&str] = &[
    "[adapter]",
    "method = ",
    "lr = 1e999",
    "data = [{ path = ",
    "r = -1",
    "nan",
    "inf",
    "target_modules = ",
    "'''",
    "\"\\u0000\"",
    "= [",
];
pub(super) const ROW_WORDS: &[&str] = &[
    "\"messages\"",
    "\"role\"",
    "\"content\"",
    "\"assistant\"",
    "\"tools\"",
    "\"tool_calls\"",
    "\"weight\"",
    "\"input_ids\"",
    "\"labels\"",
    "\"text\"",
    "\"chosen\"",
    "\"rejected\"",
    "\"label\"",
    "null",
    "-1",
    "1e400",
    "4294967296",
    "\\ud800",
    "\u{feff}",
    "\"",
    ",",
    "\n",
    "[[[[[[[[",
];

fn golden(path: &str) -> Result<Vec<u8>> {
    let path = root().join("parity/golden").join(path);
    std::fs::read(&path).with_context(|| path.display().to_string())
}

/// Files called `name` in the folders of `folder`, the smallest first, a few of them.
fn files(folder: &str, name: &str) -> Result<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(root().join("parity/golden").join(folder))? {
        all.extend(std::fs::read(entry?.path().join(name)));
    }
    all.sort_by_key(Vec::len);
    all.truncate(12);
    Ok(all)
}

pub(super) fn safetensors() -> Result<Vec<Vec<u8>>> {
    files("adapters", WEIGHTS_FILE)
}

pub(super) fn adapter_config() -> Result<Vec<Vec<u8>>> {
    let mut all = vec![golden("adapters/lora_all/adapter_config.json")?; 3];
    all.extend(files("adapters", "adapter_config.json")?);
    Ok(all)
}

pub(super) fn gguf() -> Result<Vec<Vec<u8>>> {
    Ok(vec![golden("gguf/tiny.gguf")?])
}

pub(super) fn tokenizer() -> Result<Vec<Vec<u8>>> {
    let words: serde_json::Map<String, Value> = ["[UNK]", "hello", "world", "##s", "a", "b"]
        .iter()
        .enumerate()
        .map(|(id, word)| ((*word).to_owned(), id.into()))
        .collect();
    let word_piece = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 0, "content": "[UNK]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": words},
    });
    let unigram = json!({
        "version": "1.0", "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0], ["hello", -3.0]]},
    });
    let word_level = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Removed", "invert": false},
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "hello": 1, "world": 2}, "unk_token": "<unk>"},
    });
    let mut bytes = chat::bytes().description;
    bytes["added_tokens"] = json!([{"id": 256, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}]);
    bytes["model"]["merges"] = json!([["h", "e"], ["l", "l"]]);
    bytes["model"]["vocab"]["he"] = json!(256);
    bytes["model"]["vocab"]["ll"] = json!(257);
    bytes["added_tokens"][0]["id"] = json!(258);
    Ok([word_piece, unigram, word_level, bytes].iter().map(|value| value.to_string().into_bytes()).collect())
}

pub(super) fn chat_template() -> Result<Vec<Vec<u8>>> {
    let styles = (0..).map_while(chat::wild).step_by(23).map(|subject| subject.text.into_bytes());
    Ok(SHIPPED.iter().map(|(_, text)| text.as_bytes().to_vec()).chain(styles).collect())
}

pub(super) fn recipe() -> Result<Vec<Vec<u8>>> {
    let mut all = vec![Recipe::default().to_toml()?.into_bytes()];
    for (_, method) in MethodConfig::examples() {
        let adapter = toml::Table::try_from(&method)?;
        all.push(toml::to_string(&Recipe { adapter, ..Recipe::default() })?.into_bytes());
    }
    all.push(
        b"data = [{ path = \"a.jsonl\", weight = 2.0 }]\nlr = 1e-3\n[adapter]\nr = 4\ntarget_modules = [\"q_proj\"]\n"
            .to_vec(),
    );
    Ok(all)
}

const ROWS: [&str; 9] = [
    r#"{"text": "some text"}"#,
    r#"{"prompt": "a", "completion": "b"}"#,
    r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "weight": 1}]}"#,
    r#"{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}"#,
    r#"{"instruction": "a", "input": "b", "output": "c"}"#,
    r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}"#,
    r#"{"text": "good", "label": 1}"#,
    r#"{"premise": "a", "hypothesis": "b", "label": 0}"#,
    r#"{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}"#,
];

pub(super) fn rows_jsonl() -> Result<Vec<Vec<u8>>> {
    let mut all: Vec<Vec<u8>> = ROWS.iter().map(|row| format!("{row}\n").into_bytes()).collect();
    all.push(ROWS.join("\r\n").into_bytes());
    Ok(all)
}

pub(super) fn rows_json() -> Result<Vec<Vec<u8>>> {
    Ok(vec![format!("[{}]", ROWS.join(",\n")).into_bytes(), ROWS.join("\n").into_bytes()])
}

pub(super) fn rows_csv() -> Result<Vec<Vec<u8>>> {
    let tables = [
        "text\nhello\n\"a \"\"b\"\", c\"\n",
        "prompt,completion\na,b\n\"line\nbreak\",d\n",
        "text,label\ngood,1\nbad,0\n",
    ];
    Ok(tables.map(|table| table.as_bytes().to_vec()).to_vec())
}

pub(super) fn rows_parquet() -> Result<Vec<Vec<u8>>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.parquet");
    [parquet::basic::Compression::UNCOMPRESSED, parquet::basic::Compression::SNAPPY]
        .iter()
        .map(|c| table(&path, *c))
        .collect()
}

/// A Parquet file of two columns.
fn table(path: &Path, compression: parquet::basic::Compression) -> Result<Vec<u8>> {
    let schema =
        Arc::new(parse_message_type("message rows { REQUIRED BYTE_ARRAY text (UTF8); REQUIRED INT64 label; }")?);
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(std::fs::File::create(path)?, schema, properties)?;
    let mut group = writer.next_row_group()?;
    let mut column = group.next_column()?.context("a column is missing")?;
    let texts: Vec<ByteArray> = ["good", "bad", "longer text"].map(ByteArray::from).to_vec();
    column.typed::<ByteArrayType>().write_batch(&texts, None, None)?;
    column.close()?;
    let mut column = group.next_column()?.context("a column is missing")?;
    column.typed::<Int64Type>().write_batch(&[1, 0, 1], None, None)?;
    column.close()?;
    group.close()?;
    writer.close()?;
    Ok(std::fs::read(path)?)
}
