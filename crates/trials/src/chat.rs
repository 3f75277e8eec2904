//! Chat templates and tokenizers to try: the shipped templates, others in their style, tokenizers with every mark of theirs,
//! and the real tokenizers at hand.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use espalier_data::{ChatTemplate, Message, SHIPPED, TextCodec};
use serde_json::{Value, json};

use crate::root;

/// A template to try.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// Its text.
    pub text: String,
    /// The mark that ends an assistant's turn, unless that is the end of sequence.
    pub stop: Option<String>,
}

/// Marks in a template's text: `<|...|>`, `<start_of_turn>` and the like, `[INST]`.
pub fn marks(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (open, close) in [('<', '>'), ('[', ']')] {
        for (at, _) in text.match_indices(open) {
            let Some(length) = text[at..].find(close) else { continue };
            let mark = &text[at..at + length + close.len_utf8()];
            let inner = &mark[1..mark.len() - close.len_utf8()];
            let named = inner.starts_with('|') && inner.ends_with('|') && inner.len() > 2
                || inner.starts_with('｜')
                || ["start_of_turn", "end_of_turn", "INST", "/INST"].contains(&inner);
            if named && !inner.contains([' ', '\'', '\n']) {
                found.insert(mark.to_owned());
            }
        }
    }
    found
}

/// The shipped templates.
pub fn shipped() -> Vec<Subject> {
    SHIPPED
        .iter()
        .map(|(name, text)| {
            let spoken = text.split("endgeneration").next().unwrap_or_default();
            let ends = spoken.rfind("~ ").map_or("", |at| &spoken[at + 2..]);
            let stop = if ends.starts_with("eos_token") { None } else { marks(ends).into_iter().next_back() };
            Subject { name: (*name).into(), text: (*text).into(), stop }
        })
        .collect()
}

/// A template in the style of those of real models, by number: every combination of ways to do each part.
pub fn wild(number: usize) -> Option<Subject> {
    let mut rest = number;
    let mut pick = |of: usize| {
        let picked = rest % of;
        rest /= of;
        picked
    };
    let (style, marked, trim, bos, system, stop, after) =
        (pick(4), pick(2), pick(2), pick(3), pick(4), pick(2), pick(3));
    if rest > 0 {
        return None;
    }
    let content = ["m.content", "m['content'] | trim"][trim];
    let end = ["eos_token", "'<|turn_end|>'"][stop];
    let (open, user_end) = match style {
        0 => ("'<|role_start|>' + m.role + '\\n'", end),
        1 => ("'<|' ~ m['role'] ~ '|>'", end),
        2 => ("('[INST] ' if m.role == 'user' else '')", "(' [/INST]' if m.role == 'user' else '\\n')"),
        _ => ("m.role | capitalize ~ ': '", "'\\n\\n'"),
    };
    let opened = if style == 2 {
        "''".to_owned()
    } else {
        open.replace("m.role", "'assistant'").replace("m['role']", "'assistant'")
    };
    let begin = ["", "{{ bos_token }}", ""][bos];
    let turn_bos = if bos == 2 { "{% if m.role == 'user' %}{{ bos_token }}{% endif %}" } else { "" };
    let (before, skip) = match system {
        0 => ("{% set rest = messages %}", ""),
        1 => (
            "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}{% else %}\
             {% set rest = messages %}{% set sys = '' %}{% endif %}",
            "{% if loop.first and sys %}{{ sys + '\\n\\n' }}{% endif %}",
        ),
        2 => ("{% set rest = messages | rejectattr('role', 'equalto', 'system') | list %}", ""),
        _ => {
            ("{% set rest = messages %}{% if messages[0].role != 'system' %}{{ 'You are helpful.\\n' }}{% endif %}", "")
        }
    };
    let after = ["", "{{ '\\n' }}", "\n"][after];
    let (on, off) = if marked == 1 { ("{% generation %}", "{% endgeneration %}") } else { ("", "") };
    let text = format!(
        "{before}{begin}{{% for m in rest %}}{turn_bos}{skip}{{{{ {open} }}}}{{% if m.role == 'assistant' %}}{on}{{{{ {content} ~ {end} }}}}\
         {off}{{% else %}}{{{{ {content} ~ {user_end} }}}}{{% endif %}}{after}{{% endfor %}}{{% if add_generation_prompt %}}\
         {{{{ {opened} }}}}{{% endif %}}"
    );
    Some(Subject { name: format!("style {number}"), text, stop: (stop == 1).then(|| "<|turn_end|>".to_owned()) })
}

/// A folder with a tokenizer, by name.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    /// Its name.
    pub name: String,
    /// What its `tokenizer.json` says.
    pub description: Value,
    /// Its end of sequence.
    pub eos: String,
}

/// A byte-level tokenizer without merges.
pub fn bytes() -> Tokenizer {
    // The printable bytes stand for themselves, the others for characters from 256 on.
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    let letters = (0..256).map(|b| {
        let code = if printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or_default().to_string()
    });
    let vocab: serde_json::Map<String, Value> = letters.enumerate().map(|(id, letter)| (letter, id.into())).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let description = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    Tokenizer { name: "bytes".into(), description, eos: "</s>".into() }
}

/// Folders with a tokenizer below `folder`.
fn below(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if folder.join("tokenizer.json").is_file() {
        found.push(folder.to_owned());
    }
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    folders.sort();
    for folder in folders.into_iter().filter(|_| depth > 0) {
        below(&folder, depth - 1, found);
    }
}

/// Real tokenizers: the embedded model's, those of golden models, and those under `ESPALIER_DATA`.
pub fn real(scratch: &Path) -> Result<Vec<Tokenizer>> {
    let seedling = scratch.join("seedling");
    espalier_models::seedling::write(&seedling)?;
    let mut folders = vec![seedling];
    below(&root().join("parity/golden"), 3, &mut folders);
    if let Some(data) = std::env::var_os("ESPALIER_DATA") {
        below(&PathBuf::from(data).join("tokenizers"), 2, &mut folders);
    }
    let mut all = Vec::new();
    for folder in folders {
        let text = std::fs::read(folder.join("tokenizer.json"))?;
        let codec = TextCodec::from_folder(&folder)?;
        let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let eos = codec.specials().eos.clone().with_context(|| format!("{name}: no end of sequence"))?.0;
        all.push(Tokenizer { name, description: serde_json::from_slice(&text)?, eos });
    }
    Ok(all)
}

impl Tokenizer {
    /// A model folder of it, with the marks of `template` as special tokens and its stop mark as a stop token.
    pub fn folder(&self, template: &Subject, place: &Path) -> Result<PathBuf> {
        let mut description = self.description.clone();
        let ids = |value: &Value| -> u64 {
            let of_map = |map: &Value| map.as_object().into_iter().flatten().filter_map(|(_, id)| id.as_u64()).max();
            let of_list = |list: &Value| list.as_array().map(|list| list.len() as u64 - 1);
            of_map(&value["model"]["vocab"]).or(of_list(&value["model"]["vocab"])).unwrap_or(0)
        };
        let added = description["added_tokens"].as_array().cloned().unwrap_or_default();
        let mut next =
            added.iter().filter_map(|token| token["id"].as_u64()).max().unwrap_or(0).max(ids(&description)) + 1;
        let mut wanted = marks(&template.text);
        wanted.extend(["<s>".to_owned(), self.eos.clone()].into_iter().chain(template.stop.clone()));
        for role in ["system", "user", "assistant"] {
            if template.text.contains("'<|' ~") {
                wanted.insert(format!("<|{role}|>"));
            }
        }
        let mut stop = Value::Null;
        let mut tokens = added.clone();
        for mark in wanted {
            let known = added.iter().find(|token| token["content"] == json!(mark)).map(|token| token["id"].clone());
            let known = known.or_else(|| description["model"]["vocab"].get(&mark).cloned());
            let id = known.clone().unwrap_or_else(|| json!(next));
            if !added.iter().any(|token| token["content"] == json!(mark)) {
                next += u64::from(known.is_none());
                tokens.push(json!({"id": id, "content": mark, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true}));
            }
            if template.stop.as_ref() == Some(&mark) {
                stop = id;
            }
        }
        tokens.sort_by_key(|token| token["id"].as_u64());
        description["added_tokens"] = Value::Array(tokens);
        std::fs::create_dir_all(place)?;
        std::fs::write(place.join("tokenizer.json"), description.to_string())?;
        let named = json!({"bos_token": "<s>", "eos_token": self.eos});
        std::fs::write(place.join("tokenizer_config.json"), named.to_string())?;
        std::fs::write(place.join("generation_config.json"), json!({"eos_token_id": stop}).to_string())?;
        std::fs::write(place.join("chat_template.jinja"), &template.text)?;
        Ok(place.to_owned())
    }
}

/// The text of a template without generation marks.
pub fn unmarked(text: &str) -> String {
    // What is left of a mark keeps its hold on the white space around it.
    ["generation", "endgeneration"].into_iter().fold(text.to_owned(), |text, name| {
        let text = text.replace(&format!("{{%- {name} %}}"), "{%- if true %}{%- endif %}");
        text.replace(&format!("{{% {name} %}}"), "{% if true %}{% endif %}")
    })
}

/// Conversations to render: short and long, with texts that look like something else.
pub fn conversations() -> Vec<Vec<Message>> {
    let talk = |turns: &[(&str, &str)]| turns.iter().map(|(role, text)| Message::new(*role, *text)).collect::<Vec<_>>();
    vec![
        talk(&[("user", "hello world"), ("assistant", "Grüße, 世界!")]),
        talk(&[
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "No\n\nmore."),
            ("user", "d"),
            ("assistant", "d"),
        ]),
        talk(&[
            ("system", "Be brief."),
            ("user", "Why?"),
            ("assistant", "Because."),
            ("user", "So?"),
            ("assistant", "So."),
        ]),
        talk(&[("user", "a > b"), ("assistant", ">"), ("user", "|"), ("assistant", "end")]),
        talk(&[("user", "  spaces  "), ("assistant", "  around  "), ("user", "\n"), ("assistant", "\n\tall\n")]),
        talk(&[("user", "quote"), ("assistant", "{{ messages }} {% if %} \"'\\n\u{E000}")]),
        talk(&[("user", "same"), ("assistant", "same same"), ("user", "same"), ("assistant", "same")]),
        talk(&[("user", "nothing?"), ("assistant", "")]),
    ]
}

/// A template ready to render.
pub fn template(text: &str, codec: &TextCodec) -> Result<ChatTemplate> {
    Ok(ChatTemplate::new(text, codec.specials().named.clone())?)
}
