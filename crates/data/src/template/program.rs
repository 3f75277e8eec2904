//! A template's instructions with counting put between them; see [`super::meter`].
//!
//! The engine counts instructions, and has no hook on its operators. Here its compiled form is taken instead: in front of
//! `+` and `~` both operands are counted, `*` and slices are filters, behind whatever gives a new value that value is counted, and
//! fixed text is put out like any other, so that the formatter sees it.

use std::collections::BTreeMap;

use minijinja::machinery::{CompiledTemplate, Instruction, Instructions, Vm, make_string_output};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};

use super::meter::{ATTRIBUTE, COUNT, NEST, SLICE, TIMES};

/// Stands for a filter that is looked up each time it is used.
const UNCACHED: u8 = u8::MAX;

/// A template that counts what it builds.
pub(super) struct Program<'e> {
    instructions: Instructions<'e>,
    blocks: BTreeMap<&'e str, Instructions<'e>>,
}

impl<'e> Program<'e> {
    /// The counting form of a compiled template. Other templates cannot be named: there are none.
    pub(super) fn new(compiled: &CompiledTemplate<'e>) -> Result<Self, Error> {
        let blocks = compiled.blocks.iter().map(|(name, block)| Ok((*name, counted(block)?)));
        Ok(Self { instructions: counted(&compiled.instructions)?, blocks: blocks.collect::<Result<_, Error>>()? })
    }

    /// Runs it.
    pub(super) fn render(&self, environment: &'e Environment<'e>, variables: Value) -> Result<String, Error> {
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        Vm::new(environment).eval(&self.instructions, variables, &self.blocks, &mut out, AutoEscape::None)?;
        drop(out);
        Ok(text)
    }
}

fn filter<'e>(name: &'static str, arguments: u16) -> Instruction<'e> {
    Instruction::ApplyFilter(name, Some(arguments), UNCACHED)
}

/// What an instruction becomes; jumps still have their old targets.
fn expanded<'e>(instruction: &Instruction<'e>) -> Result<Vec<Instruction<'e>>, Error> {
    use Instruction as I;
    let own = || instruction.clone();
    Ok(match instruction {
        I::EmitRaw(text) => vec![I::LoadConst(Value::from(*text)), I::Emit],
        I::Add | I::StringConcat => vec![filter(COUNT, 1), I::Swap, filter(COUNT, 1), I::Swap, own()],
        I::Mul => vec![filter(TIMES, 2)],
        I::Slice => vec![filter(SLICE, 4), filter(COUNT, 1)],
        I::ApplyFilter(..) | I::CallMethod(..) | I::CallObject(..) => vec![own(), filter(COUNT, 1)],
        I::CallFunction(..) | I::BuildList(_) | I::BuildMap(_) => vec![own(), filter(NEST, 1)],
        I::SetAttr(_) => vec![I::Swap, filter(ATTRIBUTE, 1), I::Swap, own()],
        I::Include(_) | I::LoadBlocks => {
            let message = "include, import and extends name other templates, and there are none";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        _ => vec![own()],
    })
}

fn counted<'e>(from: &Instructions<'e>) -> Result<Instructions<'e>, Error> {
    use Instruction as I;
    let mut parts = Vec::new();
    // Where each instruction begins now; one more for a jump to the end.
    let mut places = vec![0u32];
    let mut at = 0;
    while let Some(instruction) = from.get(parts.len() as u32) {
        let part = expanded(instruction)?;
        at += part.len() as u32;
        places.push(at);
        parts.push(part);
    }
    let place = |old: u32| places.get(old as usize).copied().unwrap_or(at);
    let mut all = Instructions::new(from.name(), from.source());
    for (old, part) in parts.into_iter().enumerate() {
        let line = from.get_line(old as u32).unwrap_or(1);
        for instruction in part {
            let moved = match instruction {
                I::Iterate(to) => I::Iterate(place(to)),
                I::Jump(to) => I::Jump(place(to)),
                I::JumpIfFalse(to) => I::JumpIfFalse(place(to)),
                I::JumpIfFalseOrPop(to) => I::JumpIfFalseOrPop(place(to)),
                I::JumpIfTrueOrPop(to) => I::JumpIfTrueOrPop(place(to)),
                I::BuildMacro(name, to, flags) => I::BuildMacro(name, place(to), flags),
                other => other,
            };
            all.add_with_line(moved, u16::try_from(line).unwrap_or(u16::MAX));
        }
    }
    Ok(all)
}
