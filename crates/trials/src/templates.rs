//! what a chat template trains.

use anyhow::{Context, Result};
use espalier_data::{IGNORE, Message, Row, TextCodec};

use crate::chat::{self, Subject, Tokenizer};
use crate::{Scope, Tally, Trial};

/// The trial.
pub static TRIAL: Trial = Trial {
    id: "R-14",
    title: "Chat templates",
    claim: "A conversation is trained in what its assistants say and nothing else: each trained part ends in a stop token of \
            the model, the text in front of it is what the model is given at inference, and parts found from generation \
            marks and parts derived from renderings of the beginnings are the same tokens. Every shipped template, and \
            templates in the style of those of real models (every combination of ways to do roles, system texts, bos, \
            trimming, ends and line ends), on a tokenizer of bytes, the embedded model's, and the real ones at hand with \
            the template's marks added; conversations of one to six turns, some with texts that look like marks.",
    unit: "conversations trained otherwise",
    bar: 0.0,
    bounded: 1000,
    full: 10_000,
    run,
};

/// Styles of the bounded form.
const STYLES: usize = 60;

fn run(scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let mut tokenizers = vec![chat::bytes()];
    tokenizers.extend(chat::real(scope.scratch)?);
    let styles: Vec<Subject> = (0..).map_while(chat::wild).collect();
    let stride = if scope.is_full() { 1 } else { styles.len() / STYLES };
    // A large vocabulary takes long to load: styles go over the small ones.
    for (i, tokenizer) in tokenizers.iter().enumerate() {
        let mut subjects = chat::shipped();
        if i < 2 {
            subjects.extend(styles.iter().step_by(stride).cloned());
        }
        for subject in &subjects {
            let name = format!("{} on {}", subject.name, tokenizer.name);
            each(subject, tokenizer, scope, tally).with_context(|| name)?;
        }
        tally.counts.insert(format!("templates on {}", tokenizer.name), subjects.len() as u64);
    }
    Ok(())
}

fn each(subject: &Subject, tokenizer: &Tokenizer, scope: &Scope<'_>, tally: &mut Tally) -> Result<()> {
    let codec = TextCodec::from_folder(tokenizer.folder(subject, &scope.scratch.join("model"))?)?;
    for (i, messages) in chat::conversations().iter().enumerate() {
        let fault = faults(subject, &codec, messages)?;
        let name = format!("{} on {}, conversation {i}", subject.name, tokenizer.name);
        tally.held(fault.as_ref().map_or(name.clone(), |fault| format!("{name}: {fault}")), fault.is_none());
    }
    Ok(())
}

/// What is wrong with a conversation, if anything is.
fn faults(subject: &Subject, codec: &TextCodec, messages: &[Message]) -> Result<Option<String>> {
    let template = chat::template(&subject.text, codec)?;
    let rendered = template.render(messages, None, false)?;
    let turns: Vec<usize> = (0..messages.len()).filter(|i| messages[*i].role == "assistant").collect();
    if rendered.spans.len() != turns.len() {
        return Ok(Some(format!("{} trained parts of {} turns", rendered.spans.len(), turns.len())));
    }
    for (turn, span) in turns.iter().zip(&rendered.spans) {
        let opened = template.render_text(&messages[..*turn], None, true)?;
        if rendered.text.get(..span.start) != Some(opened.as_str()) {
            return Ok(Some(format!("what stands before turn {turn} is not what inference gives")));
        }
        let said = &rendered.text[span.clone()];
        let end = subject.stop.as_deref().or(codec.specials().eos.as_ref().map(|(text, _)| text.as_str()));
        if !said.contains(messages[*turn].content.trim()) || end.is_none_or(|end| !said.ends_with(end)) {
            return Ok(Some(format!("turn {turn} is trained as {said:?}")));
        }
    }
    let row = Row::Messages { messages: messages.to_vec(), tools: None };
    let example = codec.encode(&row)?;
    let trained = |at: usize| example.labels.get(at).is_some_and(|label| *label != IGNORE);
    let ends: Vec<usize> = (0..example.labels.len()).filter(|at| trained(*at) && !trained(at + 1)).collect();
    if ends.len() != turns.len() || ends.iter().any(|at| !codec.stop_ids().contains(&example.input_ids[*at])) {
        return Ok(Some("a trained part does not end in a stop token".into()));
    }
    let bare = chat::template(&chat::unmarked(&subject.text), codec)?;
    let derived = codec.clone().with_template(bare).encode(&row)?;
    let same = derived.input_ids == example.input_ids && derived.labels == example.labels;
    Ok((!same).then(|| "marks and renderings of beginnings give different tokens".into()))
}
