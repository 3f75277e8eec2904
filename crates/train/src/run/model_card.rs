//! `README.md` of an adapter or model folder: what it adapts, how it was made, what it scores, and the command that repeats it.
//! The YAML front matter is what the Hugging Face hub reads: `base_model`, `library_name`, `pipeline_tag`, `tags`.

use std::fmt::Write as _;
use std::path::Path;

use espalier_adapters::formats::atomic;

use super::RunError;

/// Everything a card says. Empty strings and lists leave their part out.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// Heading; usually the folder's name.
    pub title: String,
    /// Base model: a hub id (`org/name`) or a folder. Only a hub id enters the front matter: the hub refuses paths.
    pub base_model: String,
    /// What the folder is to its base, in the hub's words: `adapter`, or `finetune` for a whole model.
    pub relation: String,
    /// Content hash of the base's weights.
    pub base_hash: String,
    /// Method as the field names it, for example `lora`; also a tag.
    pub method: String,
    /// Library that loads the folder: `peft` where PEFT has the method.
    pub library_name: String,
    /// The hub's task name, for example `text-generation` or `text-classification`.
    pub pipeline_tag: String,
    /// Further hub tags.
    pub tags: Vec<String>,
    /// Licence id as the hub lists them, for example `apache-2.0`.
    pub license: String,
    /// One or two sentences on the purpose.
    pub summary: String,
    /// Key figures of the method and training: rank, alpha, trained parameters, steps, ...
    pub facts: Vec<(String, String)>,
    /// Counts of the data: rows, rows refused, tokens, trained tokens, ...
    pub data: Vec<(String, String)>,
    /// Scores before and after training, on rows not trained on.
    pub scores: Vec<Score>,
    /// The resolved recipe (TOML).
    pub recipe: String,
    /// The command that made the adapter.
    pub command: String,
}

/// One evaluated figure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Score {
    /// What was measured, for example `exact match`.
    pub name: String,
    /// On which rows, for example `validation, 200 rows`.
    pub data: String,
    /// The base model's figure, formatted.
    pub before: String,
    /// The adapted model's figure, formatted.
    pub after: String,
}

impl Default for ModelCard {
    fn default() -> Self {
        Self {
            title: "Adapter".to_owned(),
            base_model: String::new(),
            relation: "adapter".to_owned(),
            base_hash: String::new(),
            method: "lora".to_owned(),
            library_name: "peft".to_owned(),
            pipeline_tag: "text-generation".to_owned(),
            tags: Vec::new(),
            license: String::new(),
            summary: String::new(),
            facts: Vec::new(),
            data: Vec::new(),
            scores: Vec::new(),
            recipe: String::new(),
            command: String::new(),
        }
    }
}

impl ModelCard {
    /// The card as Markdown with YAML front matter.
    pub fn markdown(&self) -> String {
        let mut out = self.front_matter();
        let _ = writeln!(out, "\n# {}\n", inline(&self.title));
        if !self.summary.trim().is_empty() {
            let _ = writeln!(out, "{}\n", self.summary.trim());
        }
        let mut about = vec![("Method".to_owned(), self.method.clone())];
        if !self.base_model.is_empty() {
            about.insert(0, ("Base model".to_owned(), self.base_model.clone()));
        }
        if !self.base_hash.is_empty() {
            about.insert(1.min(about.len()), ("Base content hash".to_owned(), self.base_hash.clone()));
        }
        about.extend(self.facts.iter().cloned());
        pairs(&mut out, &about);

        if !self.scores.is_empty() {
            out.push_str("\n## Scores\n\n| measure | rows | base | adapted |\n|---|---|---:|---:|\n");
            for s in &self.scores {
                let cells = [&s.name, &s.data, &s.before, &s.after].map(|c| cell(c));
                let _ = writeln!(out, "| {} |", cells.join(" | "));
            }
        }
        if !self.data.is_empty() {
            out.push_str("\n## Data\n\n");
            pairs(&mut out, &self.data);
        }
        if self.library_name == "peft" && !self.base_model.is_empty() {
            let (class, import) = match self.pipeline_tag.as_str() {
                "text-classification" => ("AutoModelForSequenceClassification", "transformers"),
                _ => ("AutoModelForCausalLM", "transformers"),
            };
            let code = format!(
                "from peft import PeftModel\nfrom {import} import {class}\n\n\
                 base = {class}.from_pretrained({})\nmodel = PeftModel.from_pretrained(base, \"path/to/this/folder\")",
                quoted(&self.base_model)
            );
            out.push_str("\n## Use\n\n");
            fence(&mut out, "python", &code);
        }
        if !self.command.trim().is_empty() || !self.recipe.trim().is_empty() {
            out.push_str("\n## Made by\n");
            if !self.command.trim().is_empty() {
                out.push('\n');
                fence(&mut out, "sh", &self.command);
            }
            if !self.recipe.trim().is_empty() {
                out.push_str("\nwith the resolved recipe\n\n");
                fence(&mut out, "toml", &self.recipe);
            }
        }
        out
    }

    /// Writes the card to `path` (usually `README.md` in the adapter folder), atomically.
    ///
    /// # Errors
    /// [`RunError::Replace`].
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), RunError> {
        Ok(atomic::write(path.as_ref(), |w| w.write_all(self.markdown().as_bytes()))?)
    }

    fn front_matter(&self) -> String {
        let mut out = String::from("---\n");
        let hub = is_hub_id(&self.base_model);
        let mut line = |key: &str, value: &str| {
            if !value.is_empty() {
                let _ = writeln!(out, "{key}: {}", quoted(value));
            }
        };
        if hub {
            line("base_model", &self.base_model);
            line("base_model_relation", &self.relation);
        }
        line("library_name", &self.library_name);
        line("pipeline_tag", &self.pipeline_tag);
        line("license", &self.license);
        let mut tags: Vec<String> = Vec::new();
        if hub {
            tags.push(format!("base_model:{}:{}", self.relation, self.base_model));
        }
        for tag in [self.method.as_str(), "espalier"].into_iter().chain(self.tags.iter().map(String::as_str)) {
            if !tag.is_empty() && !tags.iter().any(|t| t == tag) {
                tags.push(tag.to_owned());
            }
        }
        out.push_str("tags:\n");
        for tag in tags {
            let _ = writeln!(out, "- {}", quoted(&tag));
        }
        out.push_str("---\n");
        out
    }
}

/// Whether the hub would take `name` as a model id: `name` or `org/name` of letters, digits, `-`, `_` and `.`, at most
/// 96 characters, no part starting or ending in `-` or `.`.
fn is_hub_id(name: &str) -> bool {
    let part = |p: &str| {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        edge(p.chars().next())
            && edge(p.chars().next_back())
            && p.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !p.contains("--")
            && !p.contains("..")
    };
    name.len() <= 96 && name.split('/').count() <= 2 && name.split('/').all(part) && !name.ends_with(".git")
}

/// A double-quoted scalar: valid YAML, JSON and Python alike.
fn quoted(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ' ' | ':' | '+');
    if value.chars().all(plain) { format!("\"{value}\"") } else { serde_json::Value::from(value).to_string() }
}

fn inline(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn cell(text: &str) -> String {
    inline(text).replace('\\', "\\\\").replace('|', "\\|").replace('<', "&lt;")
}

fn pairs(out: &mut String, rows: &[(String, String)]) {
    out.push_str("| | |\n|---|---|\n");
    for (key, value) in rows {
        let _ = writeln!(out, "| {} | {} |", cell(key), cell(value));
    }
}

/// A fenced block whose fence is longer than any run of backticks inside.
fn fence(out: &mut String, language: &str, body: &str) {
    let mut longest = 0;
    let mut run = 0;
    for c in body.chars() {
        run = if c == '`' { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    let ticks = "`".repeat((longest + 1).max(3));
    let _ = writeln!(out, "{ticks}{language}\n{}\n{ticks}", body.trim_end());
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_model_card_has_the_hubs_front_matter() {
        let card = ModelCard {
            title: "reverse".into(),
            base_model: "HuggingFaceTB/SmolLM2-135M".into(),
            base_hash: "sha256:abc".into(),
            method: "lora".into(),
            tags: vec!["lora".into(), "a: \"b\"\n".into()],
            license: "apache-2.0".into(),
            facts: vec![("rank".into(), "8".into())],
            data: vec![("rows".into(), "1000 | 3 refused".into())],
            scores: vec![Score {
                name: "exact match".into(),
                data: "200 rows".into(),
                before: "0 %".into(),
                after: "97 %".into(),
            }],
            recipe: "a = \"```\"\n".into(),
            command: "espalier train recipe.toml".into(),
            ..ModelCard::default()
        };
        let text = card.markdown();
        let front = text.strip_prefix("---\n").unwrap().split("\n---\n").next().unwrap();
        assert_eq!(
            front,
            "base_model: \"HuggingFaceTB/SmolLM2-135M\"\nbase_model_relation: \"adapter\"\nlibrary_name: \"peft\"\n\
             pipeline_tag: \"text-generation\"\nlicense: \"apache-2.0\"\ntags:\n\
             - \"base_model:adapter:HuggingFaceTB/SmolLM2-135M\"\n- \"lora\"\n- \"espalier\"\n- \"a: \\\"b\\\"\\n\""
        );
        assert!(text.contains("| exact match | 200 rows | 0 % | 97 % |") && text.contains("1000 \\| 3 refused"));
        assert!(text.contains("````toml\na = \"```\"\n````"), "{text}");
        let dir = tempfile::tempdir().unwrap();
        card.write(dir.path().join("README.md")).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("README.md")).unwrap(), text);
    }

    #[test]
    fn a_folder_is_no_hub_id() {
        for base in ["/models/x", "./x", "../x", "a/b/c", "C:\\x", "x y/z", ""] {
            let text = ModelCard { base_model: base.into(), ..ModelCard::default() }.markdown();
            assert!(!text.split("\n---\n").next().unwrap().contains("base_model"), "{base}");
            assert_eq!(text.contains("| Base model |"), !base.is_empty());
        }
    }
}
