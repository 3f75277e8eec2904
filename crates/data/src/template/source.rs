//! What is done to a template's text before it is compiled: line ends, generation marks, and limits without which the
//! engine's compiler could be made to use up stack or memory.

use minijinja::machinery::{Token, WhitespaceConfig, tokenize};
use regex::Regex;

use super::shipped::LARGEST;
use crate::error::{DataError, Result};

/// Names of the marks among the variables of a template.
pub(super) const OPEN: &str = "espalier_generation_open";
pub(super) const CLOSE: &str = "espalier_generation_close";
/// The variable that is 1.
pub(super) const ONE: &str = "espalier_one";

/// Most operators, calls and filters between two braces: the compiler goes down one level for each.
const LONGEST_CHAIN: usize = 1000;
/// Most `elif` of a template, likewise.
const MOST_BRANCHES: usize = 500;

/// Operators that are words.
const WORDS: [&str; 6] = ["and", "or", "not", "is", "if", "in"];

/// The text to compile, and whether it has generation marks.
pub(super) fn prepare(source: &str) -> Result<(String, bool)> {
    if source.len() as u64 > LARGEST {
        return Err(DataError::Template(format!("{} bytes, more than {LARGEST}", source.len())));
    }
    // As Jinja does: whatever ends the template's lines, the text has line feeds.
    let (text, marked) = mark_generation(&source.replace("\r\n", "\n").replace('\r', "\n"))?;
    Ok((guard(text)?, marked))
}

/// Replaces generation tags by the output of a mark. The tag's own white space control is kept: its left half stands on an
/// opening `if`, its right half on the closing one.
fn mark_generation(source: &str) -> Result<(String, bool)> {
    let tag = Regex::new(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")
        .map_err(|error| DataError::Template(error.to_string()))?;
    let mut balance = 0i64;
    let text = tag.replace_all(source, |found: &regex::Captures<'_>| {
        let part = |i: usize| found.get(i).map_or("", |m| m.as_str());
        let name = if part(2) == "generation" { OPEN } else { CLOSE };
        balance += if part(2) == "generation" { 1 } else { -1 };
        format!("{{%{} if true %}}{{{{ {name} }}}}{{% endif {}%}}", part(1), part(3))
    });
    if balance != 0 {
        return Err(DataError::Template("{% generation %} and {% endgeneration %} do not pair up".into()));
    }
    let marked = matches!(text, std::borrow::Cow::Owned(_));
    Ok((text.into_owned(), marked))
}

/// Refuses chains that the compiler would follow too deep, and keeps it from multiplying constants by itself, which nothing
/// counts: `a * b` becomes `a *one* b`. What cannot be read is left to the compiler, which says why.
fn guard(text: String) -> Result<String> {
    let (mut chain, mut branches) = (0, 0);
    let mut products = Vec::new();
    let mut before_splat = true;
    for token in tokenize(&text, false, Default::default(), WhitespaceConfig::default()) {
        let Ok((token, span)) = token else { break };
        match &token {
            Token::VariableStart | Token::BlockStart => chain = 0,
            Token::Ident("elif") => branches += 1,
            Token::Ident(word) if !WORDS.contains(word) => {}
            Token::TemplateData(_) | Token::Comma | Token::Colon | Token::Str(_) | Token::String(_) => {}
            Token::Mul if !before_splat => {
                products.push(span.start_offset as usize);
                chain += 1;
            }
            _ => chain += 1,
        }
        if chain > LONGEST_CHAIN || branches > MOST_BRANCHES {
            let line = span.start_line;
            return Err(DataError::Template(format!(
                "line {line}: more than {LONGEST_CHAIN} operators in one expression, or {MOST_BRANCHES} branches"
            )));
        }
        before_splat = matches!(token, Token::ParenOpen | Token::Comma);
    }
    let mut guarded = text;
    for at in products.into_iter().rev() {
        if guarded.is_char_boundary(at) {
            guarded.insert_str(at, &format!("*{ONE}"));
        }
    }
    Ok(guarded)
}
