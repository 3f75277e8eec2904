//! The keys of a recipe: one table from which the struct, its defaults, the command line's flags and the reference follow.

use serde::{Deserialize, Serialize};

use super::values::{DataList, OneOrMany};

/// One key: what the reference and the command line say of it.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Name in recipes; the flag is the same with dashes.
    pub name: &'static str,
    /// Rust type, from which the command line knows switches, numbers and lists.
    pub kind: &'static str,
    /// Default as written in the table.
    pub default: &'static str,
    /// What it does.
    pub doc: &'static [&'static str],
}

impl Key {
    /// The documentation as one paragraph.
    pub fn text(&self) -> String {
        self.doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }
}

macro_rules! keys {
    ($($(#[doc = $doc:literal])* $name:ident: $kind:ty = $default:expr;)*) => {
        /// A training run, completely: what a recipe file says, defaults filled in.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Recipe {
            $($(#[doc = $doc])* pub $name: $kind,)*
            /// The adapter: its method, the method's settings, and where it sits.
            pub adapter: toml::Table,
            /// How parameters move: the dynamics and its settings.
            #[serde(skip_serializing_if = "toml::Table::is_empty")]
            pub dynamics: toml::Table,
        }

        impl Default for Recipe {
            fn default() -> Self {
                Self { $($name: $default,)* adapter: toml::Table::new(), dynamics: toml::Table::new() }
            }
        }

        /// All keys outside the tables `[adapter]` and `[dynamics]`.
        pub const KEYS: &[Key] = &[$(Key {
            name: stringify!($name),
            kind: stringify!($kind),
            default: stringify!($default),
            doc: &[$($doc),*],
        },)*];
    };
}

keys! {
    /// Base model: a Hugging Face folder, a .gguf file, or a hub id. Empty: the embedded seedling.
    model: String = String::new();
    /// Pre-training: the `config.json` of the new model's architecture.
    architecture: Option<String> = None;
    /// Folder of the tokenizer, where the model's own folder has none.
    tokenizer: Option<String> = None;
    /// Revision of a hub model.
    revision: Option<String> = None;
    /// Device: auto, cpu, or cuda:N.
    device: String = "auto".into();
    /// Dtype of activations and frozen weights: auto (f32 on the CPU, bf16 on CUDA), f32, bf16, f16. Adapters are f32.
    dtype: String = "auto".into();
    /// Quantisation of the frozen matrices at load: none, nf4, nf4-double, int8, or a GGUF block type (q8_0, q6_k, q5_0, q4_0, q4_k).
    quantization: String = "none".into();
    /// Number of labels of a new classification head.
    labels: Option<usize> = None;
    /// A saved adapter to start from; it brings its own method and placement.
    init_adapter: Option<String> = None;
    /// Use an adapter although it was made for another base.
    allow_base: bool = false;
    /// Seed of everything random.
    seed: u64 = 0;

    /// Training data: a file or folder, several, or tables { path, weight }.
    data: DataList = DataList::default();
    /// Evaluation data, in the same forms.
    eval_data: DataList = DataList::default();
    /// Part of the training rows set aside for evaluation: below 1 a share, else a number of rows.
    validation_split: f64 = 0.0;
    /// Longest row in tokens; 0: as long as the model allows.
    max_length: usize = 1024;
    /// Put several short examples into one row; they do not see each other.
    packing: bool = false;
    /// Shuffle the rows each epoch.
    shuffle: bool = true;
    /// Train on completions and assistant turns only.
    completion_only: bool = true;
    /// What to do with rows longer than max_length: right (cut the end), drop.
    truncation: String = "right".into();
    /// Leave out rows that cannot be used, and count them, instead of stopping at the first.
    skip_bad_rows: bool = false;
    /// Use only the first rows of each source; 0: all.
    limit_rows: usize = 0;
    /// Unit of plain-text files: line, paragraph, file.
    text_unit: String = "line".into();
    /// Column of plain text.
    text_column: Option<String> = None;
    /// Column of the prompt.
    prompt_column: Option<String> = None;
    /// Column of the completion.
    completion_column: Option<String> = None;
    /// Column of the label.
    label_column: Option<String> = None;
    /// Folder for tokenised copies of the data, used again while nothing that matters changes.
    cache_dir: Option<String> = None;

    /// Rows of a micro-batch.
    batch_size: usize = 8;
    /// Micro-batches of a step; the gradient is that of one large batch, weighed by trained tokens.
    accumulation: usize = 1;
    /// Passes over the data.
    epochs: f64 = 1.0;
    /// Steps, instead of epochs.
    max_steps: Option<usize> = None;
    /// Learning rate.
    lr: f64 = 2e-4;
    /// Course of the learning rate: constant, linear, cosine, wsd.
    schedule: String = "linear".into();
    /// Steps over which the learning rate rises from 0.
    warmup_steps: Option<usize> = None;
    /// The same as a share of all steps.
    warmup_ratio: f64 = 0.0;
    /// Lowest learning rate as a share of the highest.
    min_lr_ratio: f64 = 0.0;
    /// Share of all steps that wsd spends falling.
    decay_ratio: f64 = 0.1;
    /// Optimiser: adamw, lion, muon (AdamW for what is no matrix), sgd.
    optimizer: String = "adamw".into();
    /// Decay of AdamW's first moment; share of the momentum in Lion's direction.
    beta1: f64 = 0.9;
    /// Decay of AdamW's second moment, and of Lion's momentum (its paper: 0.99).
    beta2: f64 = 0.999;
    /// AdamW's epsilon.
    adam_eps: f64 = 1e-8;
    /// Momentum of sgd (0 where it is not given) and muon (0.95).
    momentum: Option<f64> = None;
    /// Nesterov's form of the momentum of sgd and muon.
    nesterov: bool = true;
    /// Muon's factor on the learning rate of a matrix: original, or match_rms_adamw for AdamW's learning rates.
    muon_adjust_lr: String = "original".into();
    /// Decoupled weight decay, of every optimiser.
    weight_decay: f64 = 0.0;
    /// Largest norm of the gradient; 0: no clipping.
    max_grad_norm: f64 = 1.0;
    /// Recompute blocks in the backward pass instead of keeping their intermediates.
    checkpointing: bool = false;

    /// Evaluate every so many steps; 0: at the end of each epoch.
    eval_every: usize = 0;
    /// Rows of an evaluation batch; 0: as batch_size.
    eval_batch_size: usize = 0;
    /// Stop after so many evaluations without a better loss; 0: never.
    early_stopping: usize = 0;
    /// Write a checkpoint every so many steps; 0: at the end of each epoch.
    save_every: usize = 0;
    /// Checkpoints kept beside the best one.
    keep_checkpoints: usize = 2;
    /// Finish with the weights of the best evaluation, where there is one.
    load_best: bool = true;
    /// Run folder.
    out: String = "runs/latest".into();
    /// Label names or tags for the model card.
    tags: OneOrMany = OneOrMany::default();
}
