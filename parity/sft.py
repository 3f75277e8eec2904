"""Fifty steps of TRL's SFTTrainer on pre-tokenised rows in file order: golden/curves/trl_<case>/, laid out as in `curves.py`.

The trainer is TRL's own, with its collator, its loss over the labelled tokens of a whole step and torch's AdamW; only the
sampler is replaced, by one that keeps the order of the file. `settings.made_by` names the versions.
"""

import json
import tempfile
import warnings

import adapters
import curves
import families
from common import GOLDEN, fresh, save_tensors, seed_global, torch

# case: (base, LoraConfig arguments, accumulated micro-batches)
CASES = {
    "trl_llama_lora": ("llama_gqa_tied", curves.LLAMA, 1),
    "trl_llama_dora_accumulated": ("llama_gqa_tied", curves.LLAMA | dict(use_dora=True), 2),
}


def trainer_class():
    """SFTTrainer that keeps the order of the rows and the loss of every micro-batch as it is."""
    import trl

    class InOrder(trl.SFTTrainer):
        losses, norms = [], []

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

        def log(self, logs, *args, **kwargs):
            if "grad_norm" in logs:
                self.norms.append(float(logs["grad_norm"]))
            super().log(logs, *args, **kwargs)

    return InOrder


def make():
    """Write the cases."""
    import datasets
    import peft
    import transformers
    import trl

    made_by = f"trl {trl.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, datasets {datasets.__version__}"
    for case, (base, args, accumulate) in CASES.items():
        folder = fresh(GOLDEN / "curves" / case)
        rows = curves.rows_for(case, True)
        seed_global(f"curves/{case}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(families.load(base), peft.LoraConfig(**args))
        adapters.save(model, folder / "init", base)
        (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        adamw = curves.ADAMW
        with tempfile.TemporaryDirectory() as out:
            config = trl.SFTConfig(
                output_dir=out, max_steps=curves.STEPS, per_device_train_batch_size=curves.MICRO, gradient_accumulation_steps=accumulate,
                learning_rate=adamw["lr"], adam_beta1=adamw["betas"][0], adam_beta2=adamw["betas"][1], adam_epsilon=adamw["eps"],
                weight_decay=adamw["weight_decay"], lr_scheduler_type="constant", max_grad_norm=1e9, optim="adamw_torch", logging_steps=1,
                save_strategy="no", report_to=[], use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, packing=False,
                dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True,
                max_length=None, seed=0)
            trainer = trainer_class()(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer())
            trainer.losses, trainer.norms = [], []
            trainer.train()
        losses = [sum(trainer.losses[i:i + accumulate]) for i in range(0, len(trainer.losses), accumulate)]
        assert len(losses) == curves.STEPS == len(trainer.norms), (len(losses), len(trainer.norms))
        adapters.save(model, folder / "final", base)
        ids = families.ids_for(base)
        with torch.no_grad():
            save_tensors(folder / "expected.safetensors", {"ids": ids, "logits": model.eval()(input_ids=ids).logits})
        head = dict(base=f"families/{base}", steps=curves.STEPS, batch_size=curves.MICRO, accumulate=accumulate, **adamw, schedule="constant",
            warmup_steps=0, max_grad_norm=0.0, made_by=made_by)
        log = {"losses": losses, "grad_norms": trainer.norms}
        body = json.dumps({"settings": head, **log}).replace('], "', '],\n "').replace('}, "', '},\n "')
        (folder / "losses.json").write_text(body + "\n")
        print(f"{case:28} loss {losses[0]:.4f} -> {losses[-1]:.4f} ({made_by})")


def tokenizer():
    """A tokenizer of numbers: the trainer wants one, the rows do not need it."""
    import tokenizers
    import transformers

    words = {f"t{i}": i for i in range(64)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="t0", eos_token="t2")
