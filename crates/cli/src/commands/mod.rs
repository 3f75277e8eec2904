//! One file a command: its arguments, a call into the library, and what it prints.

mod adapter;
mod bench;
mod chat;
mod check;
mod compare;
mod completions;
mod doctor;
mod eval;
mod export;
mod generate;
mod inspect;
mod logits;
mod merge_into_base;
mod model_args;
mod pretrain;
mod probe;
mod quickstart;
mod synth;
mod systems;
mod tokenizer;
mod train;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::output::{self, Output};

/// Train, compare, compose, route, transfer and serve LoRA-family adapters.
#[derive(Debug, Parser)]
#[command(name = "espalier", version, propagate_version = true, arg_required_else_help = true, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print one line of JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the whole thing on the embedded model: train an adapter, measure, merge, compare.
    Quickstart(quickstart::Quickstart),
    /// Train an adapter on a frozen base.
    Train(Box<train::Train>),
    /// Say what a recipe would do, without doing it.
    Check(Box<check::Check>),
    /// Train a model from random weights.
    Pretrain(Box<pretrain::Pretrain>),
    /// Score a model, with or without an adapter.
    Eval(eval::Eval),
    /// Continue prompts.
    Generate(generate::Generate),
    /// Talk with a model.
    Chat(chat::Chat),
    /// Write an adapter into its base and save the model.
    MergeIntoBase(merge_into_base::MergeIntoBase),
    /// Save an adapter or a model in another form.
    Export(export::Export),
    /// Judge adapter files, with or without their base.
    Adapter(adapter::Adapter),
    /// Say what is in a model, adapter or run folder.
    Inspect(inspect::Inspect),
    /// Scores of token ids, as a safetensors file.
    Logits(logits::Logits),
    /// Write generated training text.
    Synth(synth::Synth),
    /// Train a tokenizer on text.
    Tokenizer(tokenizer::TokenizerTrain),
    /// Compare methods on the same rows and budget.
    Compare(compare::Compare),
    /// List the published systems that are in here, and how much of each.
    Systems(systems::Systems),
    /// Check what a system's paper claims.
    Reproduce(systems::Reproduce),
    /// Measure speed on random weights.
    Bench(bench::Bench),
    /// Check this machine.
    Doctor(doctor::Doctor),
    /// Print shell completions or the manual page.
    Completions(completions::Completions),
}

/// What an error says of what can be done about it.
fn hint(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|e| {
        e.downcast_ref::<espalier_train::Error>()
            .and_then(espalier_train::Error::hint)
            .or_else(|| e.downcast_ref::<espalier_models::Error>().and_then(espalier_models::Error::hint))
            .or_else(|| e.downcast_ref::<espalier_infer::Error>().and_then(espalier_infer::Error::hint))
            .or_else(|| e.downcast_ref::<espalier_adapters::Error>().and_then(espalier_adapters::Error::hint))
    })
}

/// Runs the command line. Exit code 0: done; 1: failed; 2: the command line is wrong.
pub(crate) fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let parsed = Cli::command().try_get_matches_from(args).and_then(|m| Cli::from_arg_matches(&m));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let out = Output::new(cli.json);
    let result = match cli.command {
        Command::Quickstart(c) => c.run(out),
        Command::Train(c) => c.run(out),
        Command::Check(c) => c.run(out),
        Command::Pretrain(c) => c.run(out),
        Command::Eval(c) => c.run(out),
        Command::Generate(c) => c.run(out),
        Command::Chat(c) => c.run(out),
        Command::MergeIntoBase(c) => c.run(out),
        Command::Export(c) => c.run(out),
        Command::Adapter(c) => c.run(out),
        Command::Inspect(c) => c.run(out),
        Command::Logits(c) => c.run(out),
        Command::Synth(c) => c.run(out),
        Command::Tokenizer(c) => c.run(out),
        Command::Compare(c) => c.run(out),
        Command::Systems(c) => c.run(out),
        Command::Reproduce(c) => c.run(out),
        Command::Bench(c) => c.run(out),
        Command::Doctor(c) => c.run(out),
        Command::Completions(c) => c.run(Cli::command()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error, hint(&error).as_deref());
            ExitCode::FAILURE
        }
    }
}
