//! From rows to token ids and labels, and back to text.
//!
//! Labels follow the convention of `transformers`: `labels[i]` belongs to token i itself and is -100 where masked; the loss
//! shifts. Conversations are tokenised as the template renders them, without further special tokens; prompt and completion
//! as one text, so that the tokens are those of inference; a token that reaches into the trained part is trained.

mod classify;
mod folder;
mod guard;
mod label;
mod limit;
mod special;
mod stream;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::{Encoding, Tokenizer};

pub(crate) use folder::read_json;
use guard::guarded;
use label::label_spans;
pub use limit::Truncation;
pub use special::SpecialTokens;
pub use stream::StreamDecoder;

use crate::error::{DataError, Result, RowError};
use crate::row::{Message, Row};
use crate::template::{ChatTemplate, SpansFrom};

type Outcome<T> = std::result::Result<T, RowError>;

/// Label of tokens that the loss passes over.
pub const IGNORE: i32 = -100;

/// How rows are encoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncodeOptions {
    /// Most tokens of an example; none: no limit.
    pub max_length: Option<usize>,
    /// Train only on what assistants say and on completions. Text rows are trained whole either way.
    pub completion_only: bool,
    /// Append the end-of-sequence token to text and completions.
    pub add_eos: bool,
    /// What happens to longer examples.
    pub truncation: Truncation,
    /// Names of the classes by index, for data that name them.
    pub label_names: Option<Vec<String>>,
    /// Render prompt and completion as a user's and an assistant's message of the chat template.
    pub apply_chat_template: bool,
    /// Accept conversations whose trained turns do not end in a stop token.
    pub allow_no_stop: bool,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            max_length: None,
            completion_only: true,
            add_eos: true,
            truncation: Truncation::Right,
            label_names: None,
            apply_chat_template: false,
            allow_no_stop: false,
        }
    }
}

/// One encoded row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids `[t]`.
    pub input_ids: Vec<u32>,
    /// Label of each token itself `[t]`, [`IGNORE`] where masked.
    pub labels: Vec<i32>,
    /// Class of a classification row.
    pub class: Option<u32>,
    /// Whether tokens were cut off.
    pub truncated: bool,
    /// Whether the cut went through a trained part, which has lost its end or its beginning.
    pub answer_cut: bool,
    /// Whether only the last turn of a conversation is trained, because its template writes earlier ones otherwise then.
    pub last_turn_only: bool,
}

impl Example {
    /// Tokens that the loss counts: labels other than [`IGNORE`], less the first token, which nothing predicts.
    pub fn trained_tokens(&self) -> usize {
        self.labels.iter().skip(1).filter(|label| **label != IGNORE).count()
    }
}

/// Tokenizer, chat template and options: everything between a row and its ids.
#[derive(Debug, Clone)]
pub struct TextCodec {
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    specials: SpecialTokens,
    options: EncodeOptions,
    vocab_size: usize,
    identity: [u8; 32],
}

impl TextCodec {
    /// A codec of its parts. The tokenizer's own truncation and padding are switched off.
    pub fn new(mut tokenizer: Tokenizer, template: Option<ChatTemplate>, specials: SpecialTokens) -> Result<Self> {
        let fault =
            |error: tokenizers::Error| DataError::Tokenizer { path: "tokenizer".into(), message: error.to_string() };
        tokenizer.with_truncation(None).map_err(fault)?;
        tokenizer.with_padding(None);
        let identity = Sha256::digest(tokenizer.to_string(false).map_err(fault)?).into();
        let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        Ok(Self {
            tokenizer: Some(tokenizer),
            template,
            specials,
            options: EncodeOptions::default(),
            vocab_size,
            identity,
        })
    }

    /// A codec without a tokenizer, for rows that are token ids already.
    pub fn ids_only(vocab_size: usize) -> Self {
        Self {
            tokenizer: None,
            template: None,
            specials: SpecialTokens::default(),
            options: EncodeOptions::default(),
            vocab_size,
            identity: [0; 32],
        }
    }

    /// The same codec with these options.
    #[must_use]
    pub fn with_options(mut self, options: EncodeOptions) -> Self {
        self.options = options;
        self
    }

    /// The same codec with this chat template.
    #[must_use]
    pub fn with_template(mut self, template: ChatTemplate) -> Self {
        self.template = Some(template);
        self
    }

    /// The same codec, accepting ids below `size`: a model's embedding often has more rows than the tokenizer has tokens.
    #[must_use]
    pub fn with_vocab_size(mut self, size: usize) -> Self {
        self.vocab_size = size;
        self
    }

    /// The options.
    pub fn options(&self) -> &EncodeOptions {
        &self.options
    }

    /// The tokenizer, unless this codec takes only ids.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The chat template, where there is one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Special tokens.
    pub fn specials(&self) -> &SpecialTokens {
        &self.specials
    }

    /// Ids are below this number.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Id of the beginning-of-sequence token.
    pub fn bos_id(&self) -> Option<u32> {
        self.specials.bos.as_ref().map(|(_, id)| *id)
    }

    /// Id of the end-of-sequence token.
    pub fn eos_id(&self) -> Option<u32> {
        self.specials.eos.as_ref().map(|(_, id)| *id)
    }

    /// Id for padding: the padding token, else the end of sequence, else 0.
    pub fn pad_id(&self) -> u32 {
        self.specials.pad.as_ref().map(|(_, id)| *id).or(self.eos_id()).unwrap_or(0)
    }

    /// Ids at which generation ends: the end of sequence and those that the model folder names.
    pub fn stop_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.eos_id().into_iter().chain(self.specials.stop.iter().copied()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Everything that encodings depend on, as bytes for a cache key.
    pub(crate) fn fingerprint(&self) -> [Vec<u8>; 3] {
        let template = self.template.as_ref().map(ChatTemplate::fingerprint).unwrap_or_default();
        let rest = serde_json::to_vec(&(&self.options, &self.specials, self.vocab_size)).unwrap_or_default();
        [self.identity.to_vec(), template, rest]
    }

    /// Ids of a text as the model's own tokenizer gives them: `special` adds the tokens it puts around a text.
    pub fn encode_text(&self, text: &str, special: bool) -> Outcome<Vec<u32>> {
        let encoding = self.tokenize(text, special)?;
        let mut ids = encoding.get_ids().to_vec();
        if special && let Some(bos) = self.declared_bos(&ids) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Ids that open an assistant's turn behind a conversation.
    pub fn encode_prompt(&self, messages: &[Message], tools: Option<&Value>) -> Outcome<Vec<u32>> {
        let template = self.template.as_ref().ok_or(RowError::NoTemplate)?;
        self.encode_text(&template.render_text(messages, tools, true)?, false)
    }

    /// Text of ids; `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Outcome<String> {
        let tokenizer = self.tokenizer.as_ref().ok_or(RowError::NoTokenizer)?;
        guarded(|| tokenizer.decode(ids, skip_special)).map_err(RowError::Tokenizer)
    }

    /// A decoder of one growing sequence.
    pub fn stream(&self, skip_special: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, skip_special)
    }

    /// Ids and labels of a row. Preference rows are for a preference objective and refused here.
    pub fn encode(&self, row: &Row) -> Outcome<Example> {
        match row {
            Row::Messages { messages, tools } => self.conversation(messages, tools.as_ref()),
            Row::PromptCompletion { prompt, completion } if self.options.apply_chat_template => {
                let messages =
                    [Message::new("user", prompt.trim_end()), Message::new("assistant", completion.as_str())];
                self.conversation(&messages, None)
            }
            Row::PromptCompletion { prompt, completion } => {
                let text = format!("{prompt}{completion}");
                let from = if self.options.completion_only { prompt.len() } else { 0 };
                self.plain(&text, from)
            }
            Row::Text { text } => self.plain(text, 0),
            Row::Classification { text, text_pair, label } => self.classified(text, text_pair.as_deref(), label),
            Row::Tokens { input_ids, labels, attention_mask } => {
                self.ready(input_ids, labels.as_deref(), attention_mask.as_deref())
            }
            Row::Preference { .. } => {
                Err(RowError::Unsupported("chosen and rejected replies need a preference objective".into()))
            }
        }
    }

    fn tokenize(&self, text: &str, special: bool) -> Outcome<Encoding> {
        let tokenizer = self.tokenizer.as_ref().ok_or(RowError::NoTokenizer)?;
        guarded(|| tokenizer.encode(text, special)).map_err(RowError::Tokenizer)
    }

    /// The declared beginning-of-sequence token, where ids lack it.
    fn declared_bos(&self, ids: &[u32]) -> Option<u32> {
        self.bos_id().filter(|bos| self.specials.add_bos && ids.first() != Some(bos))
    }

    fn conversation(&self, messages: &[Message], tools: Option<&Value>) -> Outcome<Example> {
        let template = self.template.as_ref().ok_or(RowError::NoTemplate)?;
        if self.options.completion_only {
            let rendered = template.render(messages, tools, false)?;
            let encoding = self.tokenize(&rendered.text, false)?;
            let labels = label_spans(&encoding, &rendered.spans);
            let example = self.finish(encoding.get_ids().to_vec(), labels, None)?;
            return Ok(Example { last_turn_only: rendered.spans_from == SpansFrom::LastTurn, ..example });
        }
        let ids = self.encode_text(&template.render_text(messages, tools, false)?, false)?;
        let labels = ids.iter().map(|id| *id as i32).collect();
        self.finish(ids, labels, None)
    }

    /// Text trained from byte `from` on.
    fn plain(&self, text: &str, from: usize) -> Outcome<Example> {
        let encoding = self.tokenize(text, true)?;
        let mut ids = encoding.get_ids().to_vec();
        let mut labels = if from == 0 {
            ids.iter().map(|id| *id as i32).collect()
        } else {
            let mut labels = label_spans(&encoding, std::slice::from_ref(&(from..text.len())));
            // Special tokens that the tokenizer sets behind the text end the completion.
            let behind = encoding.get_special_tokens_mask().iter().rev().take_while(|mask| **mask == 1).count();
            let body = ids.len().saturating_sub(behind);
            for (label, id) in labels.iter_mut().zip(&ids).skip(body.max(1)) {
                *label = *id as i32;
            }
            labels
        };
        if let Some(bos) = self.declared_bos(&ids) {
            ids.insert(0, bos);
            labels.insert(0, IGNORE);
        }
        if self.options.add_eos
            && let Some(eos) = self.eos_id()
            && ids.last() != Some(&eos)
        {
            ids.push(eos);
            labels.push(eos as i32);
        }
        self.finish(ids, labels, None)
    }

    fn ready(&self, ids: &[u32], labels: Option<&[i64]>, mask: Option<&[u8]>) -> Outcome<Example> {
        let vocab = self.vocab_size;
        for (key, found) in [("labels", labels.map(<[i64]>::len)), ("attention_mask", mask.map(<[u8]>::len))] {
            if let Some(found) = found.filter(|found| *found != ids.len()) {
                return Err(RowError::Length { key, found, expected: ids.len() });
            }
        }
        let (mut kept, mut kept_labels) = (Vec::with_capacity(ids.len()), Vec::with_capacity(ids.len()));
        for (at, &id) in ids.iter().enumerate() {
            if id as usize >= vocab {
                return Err(RowError::TokenId { key: "input_ids", at, id: i64::from(id), vocab });
            }
            let label = labels.and_then(|labels| labels.get(at).copied()).unwrap_or(i64::from(id));
            if label != i64::from(IGNORE) && !(0..vocab as i64).contains(&label) {
                return Err(RowError::TokenId { key: "labels", at, id: label, vocab });
            }
            if mask.and_then(|mask| mask.get(at)) != Some(&0) {
                kept.push(id);
                kept_labels.push(label as i32);
            }
        }
        self.finish(kept, kept_labels, None)
    }
}
