//! Chat templates: a conversation as the text that the model was trained on, with the spans of what assistants say.
//!
//! The templates are the Jinja texts of model folders, run as `transformers` runs them: blocks trimmed, Python's methods of
//! strings, lists and dictionaries, `raise_exception`, `strftime_now`, `tojson` in Python's spelling, `break` and
//! `continue`, and `{% generation %}` blocks. A template without such blocks has its spans derived in [`spans`].
//! Instructions are counted, so that an endless template fails instead of hanging, and so is what it builds ([`meter`]).

mod functions;
mod meter;
mod operators;
mod program;
mod repr;
mod shipped;
mod source;
mod spans;

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use minijinja::machinery::get_compiled_template;
use minijinja::{AutoEscape, Environment, State, Value as Jinja};
use serde_json::{Map, Value};
pub use shipped::{SHIPPED, shipped};

use program::Program;

use crate::error::{DataError, Result, RowError};
use crate::row::Message;

/// Instructions that one rendering may take: hundreds of times those of a long conversation, a second or two.
const FUEL: u64 = 20_000_000;

/// The file of a model folder's template.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";

/// How the trained spans were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpansFrom {
    /// From `{% generation %}` blocks.
    Generation,
    /// From the lengths of renderings of the conversation's beginnings.
    Prefix,
    /// As [`SpansFrom::Prefix`], for the last trained turn alone: the template writes earlier ones otherwise once others follow.
    LastTurn,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text for the tokenizer, special tokens included.
    pub text: String,
    /// Byte ranges of what is trained, in order, end-of-turn marks included.
    pub spans: Vec<Range<usize>>,
    /// How the spans were found.
    pub spans_from: SpansFrom,
}

/// A chat template, ready to render.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    tool_use: Option<String>,
    /// Where it is from, for messages.
    origin: Option<String>,
    marked: bool,
    specials: BTreeMap<String, String>,
    clock: i64,
}

impl ChatTemplate {
    /// A template from its text. `specials` are the names the template may use for special tokens, such as `bos_token`.
    pub fn new(source: &str, specials: BTreeMap<String, String>) -> Result<Self> {
        Self::with_tool_use(source, None, specials)
    }

    fn with_tool_use(source: &str, tool_use: Option<&str>, specials: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_keep_trailing_newline(false);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        meter::install(&mut environment);
        environment.add_function("raise_exception", functions::raise_exception);
        environment.add_filter("tojson", functions::tojson);
        environment.add_filter("string", repr::string);
        environment.set_formatter(repr::format);
        let mut marked = false;
        for (name, text) in [("default", Some(source)), ("tool_use", tool_use)] {
            let Some(text) = text else { continue };
            let (text, has_marks) = source::prepare(text)?;
            marked |= has_marks;
            environment
                .add_template_owned(name, text)
                .map_err(|error| DataError::Template(format!("{name}: {}", functions::explain(&error))))?;
            let compiled =
                environment.get_template(name).and_then(|t| Program::new(get_compiled_template(&t)).map(|_| ()));
            compiled.map_err(|error| DataError::Template(format!("{name}: {}", functions::explain(&error))))?;
        }
        let mut template = Self {
            environment,
            source: source.to_string(),
            tool_use: tool_use.map(str::to_string),
            origin: None,
            marked,
            specials,
            clock: 0,
        };
        template.set_clock(functions::today());
        Ok(template)
    }

    /// The template of a model folder: `chat_template.jinja`, else `chat_template.json`, else the `chat_template` of
    /// `tokenizer_config.json` (one text, or a list of names and texts of which `default` and `tool_use` are used).
    pub fn from_folder(folder: &Path, specials: BTreeMap<String, String>) -> Result<Option<Self>> {
        let file = folder.join(TEMPLATE_FILE);
        if file.is_file() {
            return Self::new(&shipped::read(&file)?, specials)
                .map(|template| Some(template.read_from(&file)))
                .map_err(|error| error.in_file(&file));
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let file = folder.join(name);
            if !file.is_file() {
                continue;
            }
            let config = crate::encode::read_json(&file)?;
            match config.get("chat_template") {
                None | Some(Value::Null) => {}
                Some(Value::String(text)) => {
                    return Self::new(text, specials)
                        .map(|template| Some(template.read_from(&file)))
                        .map_err(|error| error.in_file(&file));
                }
                Some(Value::Array(list)) => {
                    let named = |name: &str| {
                        list.iter()
                            .find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))
                            .and_then(|entry| entry.get("template"))
                            .and_then(Value::as_str)
                    };
                    let default = named("default").ok_or_else(|| {
                        DataError::Template(format!(
                            "{}: the list of chat templates has none named default",
                            file.display()
                        ))
                    })?;
                    return Self::with_tool_use(default, named("tool_use"), specials)
                        .map(|template| Some(template.read_from(&file)))
                        .map_err(|error| error.in_file(&file));
                }
                Some(_) => {
                    return Err(DataError::Template(format!(
                        "{}: chat_template is neither text nor a list",
                        file.display()
                    )));
                }
            }
        }
        Ok(None)
    }

    fn read_from(mut self, file: &Path) -> Self {
        self.origin = Some(file.display().to_string());
        self
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The time that `strftime_now` shows, in seconds since 1970 (UTC). It starts as the midnight before now.
    pub fn clock(&self) -> i64 {
        self.clock
    }

    /// Sets the time that `strftime_now` shows, in seconds since 1970 (UTC), so that a run can be repeated on another day.
    pub fn set_clock(&mut self, seconds: i64) {
        self.clock = seconds;
        self.environment.add_function("strftime_now", move |state: &State<'_, '_>, format: String| {
            // The longest name of a day or month stands for two characters.
            meter::spend(state, format.len().saturating_mul(5))?;
            Ok(functions::strftime(seconds, &format))
        });
    }

    /// Everything that the output depends on, as bytes for a cache key.
    pub(crate) fn fingerprint(&self) -> Vec<u8> {
        let mentions_time =
            [Some(&self.source), self.tool_use.as_ref()].into_iter().flatten().any(|t| t.contains("strftime_now"));
        let clock = mentions_time.then_some(self.clock);
        serde_json::to_vec(&(&self.source, &self.tool_use, &self.specials, clock)).unwrap_or_default()
    }

    /// The conversation as text, without spans. `add_generation_prompt` appends the opening of an assistant's turn.
    pub fn render_text(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> std::result::Result<String, RowError> {
        let used = self.chosen(tools);
        self.refuse_losses(used.1, messages, tools)?;
        Ok(self.run(&self.program(used.0)?, messages, tools, add_generation_prompt)?.0)
    }

    /// The conversation as text with the spans of what is trained.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> std::result::Result<Rendered, RowError> {
        let (name, source) = self.chosen(tools);
        self.refuse_losses(source, messages, tools)?;
        let program = self.program(name)?;
        let (text, marks) = self.run(&program, messages, tools, add_generation_prompt)?;
        let (spans, spans_from) = if self.marked {
            (spans::from_marks(messages, marks)?, SpansFrom::Generation)
        } else {
            let prefix = |count: usize, open: bool| {
                self.run(&program, messages.get(..count).unwrap_or(messages), tools, open).map(|(text, _)| text)
            };
            let (spans, all) = spans::from_prefixes(messages, &text, prefix)?;
            (spans, if all { SpansFrom::Prefix } else { SpansFrom::LastTurn })
        };
        Ok(Rendered { text, spans, spans_from })
    }

    /// Name and text of the template in use.
    fn chosen(&self, tools: Option<&Value>) -> (&'static str, &str) {
        match (&self.tool_use, tools) {
            (Some(text), Some(_)) => ("tool_use", text),
            _ => ("default", &self.source),
        }
    }

    /// What the template would drop without a word is an error.
    fn refuse_losses(
        &self,
        source: &str,
        messages: &[Message],
        tools: Option<&Value>,
    ) -> std::result::Result<(), RowError> {
        if tools.is_some() && !source.contains("tools") {
            return Err(RowError::Unsupported(
                "the row has tools, which the chat template does not show; describe them in a system message".into(),
            ));
        }
        if messages.iter().any(Message::has_tool_calls) && !source.contains("tool_calls") {
            return Err(RowError::Unsupported(
                "a message has tool_calls, which the chat template does not show; write them into its content".into(),
            ));
        }
        Ok(())
    }

    /// The counting form of a template.
    fn program(&self, name: &str) -> std::result::Result<Program<'_>, RowError> {
        let template = self.environment.get_template(name).map_err(|error| self.failed(functions::explain(&error)))?;
        Program::new(get_compiled_template(&template)).map_err(|error| self.failed(functions::explain(&error)))
    }

    fn failed(&self, what: String) -> RowError {
        RowError::Template(self.origin.as_ref().map_or(what.clone(), |origin| format!("{origin}: {what}")))
    }

    /// One rendering: text and the byte ranges between generation marks.
    fn run(
        &self,
        program: &Program<'_>,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> std::result::Result<(String, Vec<Range<usize>>), RowError> {
        let views: Vec<Value> = messages.iter().map(Message::view).collect();
        let (open, close) = spans::unused_marks(&views, tools)
            .ok_or_else(|| RowError::Template("the conversation uses every private-use character".into()))?;
        let mut context: Map<String, Value> =
            self.specials.iter().map(|(key, value)| (key.clone(), Value::String(value.clone()))).collect();
        context.insert("messages".into(), Value::Array(views));
        context.insert("tools".into(), tools.cloned().unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), Value::Bool(add_generation_prompt));
        context.insert(source::OPEN.into(), Value::String(open.to_string()));
        context.insert(source::CLOSE.into(), Value::String(close.to_string()));
        context.insert(source::ONE.into(), Value::from(1));
        let size = views_size(&context);
        let variables = Jinja::from_serialize(&context);
        let variables =
            minijinja::context! { ..minijinja::context!(espalier_meter => meter::Meter::of(size)), ..variables };
        // The engine's own assertions must not end the process.
        let rendered = catch_unwind(AssertUnwindSafe(|| program.render(&self.environment, variables)));
        let text = match rendered {
            Ok(Ok(text)) => text,
            Ok(Err(error)) => return Err(self.failed(functions::explain(&error))),
            Err(_) => return Err(self.failed("the template engine failed".into())),
        };
        if self.marked { spans::strip(&text, open, close) } else { Ok((text, Vec::new())) }
    }
}

/// About how many bytes a conversation has.
fn views_size(context: &Map<String, Value>) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(|item| 8 + of(item)).sum(),
            Value::Object(map) => map.iter().map(|(key, item)| 8 + key.len() + of(item)).sum(),
            _ => 8,
        }
    }
    context.values().map(of).sum()
}
