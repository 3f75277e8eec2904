//! The list of all systems: one line each, with a file of checks where there is something to check.

use crate::{Lab, Status, System};

macro_rules! checked {
    ($($module:ident),*) => { $(pub mod $module;)* };
}

checked!(block_lora, bone, codyra, dylora, lora_ga, lora_sb, nola, randlora);

type Checks = fn(&mut Lab) -> anyhow::Result<()>;

const fn planned(name: &'static str, title: &'static str, paper: &'static str, axis: &'static str) -> System {
    System { name, title, paper, axis, code: &[], status: Status::NotYet, missing: "all of it", checks: None }
}

const fn built(
    (name, title, paper, axis): (&'static str, &'static str, &'static str, &'static str),
    code: &'static [&'static str],
    missing: &'static str,
    checks: Checks,
) -> System {
    let status = if missing.is_empty() { Status::Works } else { Status::Partly };
    System { name, title, paper, axis, code, status, missing, checks: Some(checks) }
}

const fn unchecked(
    (name, title, paper, axis): (&'static str, &'static str, &'static str, &'static str),
    code: &'static [&'static str],
    missing: &'static str,
) -> System {
    System { name, title, paper, axis, code, status: Status::Partly, missing, checks: None }
}

/// All systems, in the order in which they were chosen.
pub static SYSTEMS: &[System] = &[
    planned(
        "octo-planner",
        "Octo-planner: On-device Language Model for Planner-Action Agents",
        "arXiv 2406.18082",
        "composition",
    ),
    planned(
        "cmlora",
        "Cached Multi-Lora Composition for Multi-Concept Image Generation",
        "arXiv 2502.04923",
        "composition",
    ),
    planned(
        "lorid",
        "Can Large Models Teach Student Models to Solve Mathematical Problems Like Human Beings? A Reasoning Distillation Method via Multi-LoRA Interaction",
        "arXiv 2508.13037",
        "objective",
    ),
    planned(
        "gs-vton",
        "GS-VTON: Controllable 3D Virtual Try-on with Gaussian Splatting",
        "arXiv 2410.05259",
        "objective",
    ),
    planned(
        "lorat",
        "Tracking Meets LoRA: Faster Training, Larger Model, Stronger Performance",
        "arXiv 2403.05231",
        "parametrisation",
    ),
    planned(
        "lora-composer",
        "LoRA-Composer: Leveraging Low-Rank Adaptation for Multi-Concept Customization in Training-Free Diffusion Models",
        "arXiv 2403.11627",
        "composition",
    ),
    planned(
        "more-xray-ecg",
        "MoRE: Multi-Modal Contrastive Pre-training with Transformers on X-Rays, ECGs, and Diagnostic Report",
        "arXiv 2410.16239",
        "objective",
    ),
    planned(
        "regionblip",
        "RegionBLIP: A Unified Multi-modal Pre-training Framework for Holistic and Regional Comprehension",
        "arXiv 2308.02299",
        "parametrisation",
    ),
    planned(
        "tara",
        "TARA: Token-Aware LoRA for Composable Personalization in Diffusion Models",
        "arXiv 2508.08812",
        "parametrisation",
    ),
    planned(
        "mrdpo",
        "Enhancing Multimodal LLM for Detailed and Accurate Video Captioning using Multi-Round Preference Optimization",
        "arXiv 2410.06682",
        "objective",
    ),
    planned(
        "aigveval",
        "Towards Holistic Visual Quality Assessment of AI-Generated Videos: A LLM-Based Multi-Dimensional Evaluation Model",
        "arXiv 2506.04715",
        "objective",
    ),
    planned(
        "gazal-r1",
        "Gazal-R1: Achieving State-of-the-Art Medical Reasoning with Parameter-Efficient Two-Stage Training",
        "arXiv 2506.21594",
        "objective",
    ),
    planned(
        "mtp-gated-lora",
        "Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential",
        "arXiv 2507.11851",
        "parametrisation",
    ),
    planned(
        "video-salmonn-2",
        "video-SALMONN 2: Captioning-Enhanced Audio-Visual Large Language Models",
        "arXiv 2506.15220",
        "objective",
    ),
    planned(
        "uni-moe",
        "Uni-MoE: Scaling Unified Multimodal LLMs with Mixture of Experts",
        "arXiv 2405.11273",
        "routing",
    ),
    planned("wavllm", "WavLLM: Towards Robust and Adaptive Speech Large Language Model", "arXiv 2404.00656", "routing"),
    planned(
        "clora-compose",
        "CLoRA: A Contrastive Approach to Compose Multiple LoRA Models",
        "arXiv 2403.19776",
        "composition",
    ),
    planned(
        "smora",
        "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
        "arXiv 2501.15103",
        "routing",
    ),
    planned("icm-lora", "In-Context Meta LoRA Generation", "arXiv 2501.17635", "composition"),
    planned(
        "icm-fusion",
        "ICM-Fusion: In-Context Meta-Optimized LoRA Fusion for Multi-Task Adaptation",
        "arXiv 2508.04153",
        "composition",
    ),
    planned(
        "arcana",
        "Improving Multi-modal Large Language Model through Boosting Vision Capabilities",
        "arXiv 2410.13733",
        "routing",
    ),
    built(
        (
            "dylora",
            "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
            "arXiv 2210.07558",
            "parametrisation, dynamics",
        ),
        &["crates/adapters/src/parametrisation/dylora.rs", "crates/train/src/dynamics/dylora.rs"],
        "its behaviour over ranks after training",
        dylora::checks,
    ),
    planned(
        "lora-mixer",
        "LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing",
        "arXiv 2507.00029",
        "routing",
    ),
    built(
        ("lora-ga", "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", "arXiv 2407.05000", "initialisation"),
        &["crates/adapters/src/initialisation/lora_ga.rs", "crates/train/src/evidence.rs"],
        "",
        lora_ga::checks,
    ),
    unchecked(
        ("allora", "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", "arXiv 2410.09692", "dynamics"),
        &["crates/train/src/dynamics/allora.rs"],
        "its reproduction and its ablations",
    ),
    planned(
        "lora-lego",
        "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise Clustering",
        "arXiv 2409.16167",
        "composition",
    ),
    unchecked(
        ("layra", "Continually Adding New Languages to Multilingual Language Models", "arXiv 2509.11414", "placement"),
        &["crates/adapters/src/target.rs"],
        "the stream of languages and the arithmetic with instruction-tuned models; layers are chosen by layers_to_transform",
    ),
    built(
        (
            "randlora",
            "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
            "arXiv 2502.00987",
            "parametrisation",
        ),
        &["crates/adapters/src/parametrisation/randlora.rs"],
        "",
        randlora::checks,
    ),
    planned(
        "trans-lora",
        "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning",
        "arXiv 2405.17258",
        "composition",
    ),
    built(
        (
            "lora-sb",
            "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
            "arXiv 2411.19557",
            "parametrisation, initialisation",
        ),
        &["crates/adapters/src/parametrisation/lora_xs.rs", "crates/train/src/evidence.rs"],
        "",
        lora_sb::checks,
    ),
    built(
        (
            "bone",
            "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
            "arXiv 2409.15371",
            "parametrisation",
        ),
        &["crates/adapters/src/parametrisation/bone.rs"],
        "",
        bone::checks,
    ),
    built(
        (
            "nola",
            "NOLA: Networks as Linear Combination of Low Rank Random Basis",
            "arXiv 2310.02556",
            "parametrisation",
        ),
        &["crates/adapters/src/parametrisation/nola.rs"],
        "its claim of compression at equal quality on a pretrained model",
        nola::checks,
    ),
    built(
        (
            "block-lora",
            "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning",
            "arXiv 2501.16720",
            "parametrisation",
        ),
        &["crates/adapters/src/parametrisation/block_lora.rs"],
        "few-shot tuning of CLIP, which needs a vision tower",
        block_lora::checks,
    ),
    planned(
        "cellm",
        "CELLM: An Efficient Communication in Large Language Models Training for Federated Learning",
        "arXiv 2407.20557",
        "objective",
    ),
    planned("mola", "Higher Layers Need More LoRA Experts", "arXiv 2402.08562", "routing"),
    unchecked(
        (
            "switchlora",
            "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information",
            "arXiv 2406.06564",
            "dynamics",
        ),
        &["crates/train/src/dynamics/switchlora.rs"],
        "its reproduction in pre-training",
    ),
    unchecked(
        ("lora-pro", "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", "arXiv 2407.18242", "dynamics"),
        &["crates/train/src/dynamics/lora_pro.rs"],
        "its reproduction",
    ),
    unchecked(
        (
            "lisa",
            "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
            "arXiv 2403.17919",
            "dynamics",
        ),
        &["crates/train/src/dynamics/lisa.rs"],
        "its reproduction",
    ),
    planned("o3-unlearning", "Practical Unlearning for Large Language Models", "arXiv 2407.10223", "objective"),
    built(
        (
            "codyra",
            "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with Dynamic Rank-Selective LoRA",
            "arXiv 2412.01004",
            "parametrisation, dynamics",
        ),
        &["crates/adapters/src/parametrisation/codyra.rs"],
        "the proximal step and the stream of tasks",
        codyra::checks,
    ),
    planned(
        "llava-mole",
        "LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs",
        "arXiv 2401.16160",
        "routing",
    ),
];
