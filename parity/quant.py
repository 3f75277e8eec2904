"""Frozen-base formats: NF4 and int8 as bitsandbytes computes them, and a tiny GGUF model.

golden/quant/nf4.safetensors
  input [24, 80] f32 (block 5 is all zero); code [16] f32; packed [960] u8 (first value in the high nibble);
  absmax [30] f32; dequantised [24, 80] f32
  double.absmax [30] u8, double.absmax2 [1] f32 (blocks of 256), double.code [256] f32 (dynamic map), double.offset [1] f32
  (mean of absmax), double.restored_absmax [30] f32, double.dequantised [24, 80] f32; packed is the same
  tail.*: input [3, 25]: 75 values, so the last block holds 11 and the last byte's low nibble is padding
golden/quant/int8.safetensors
  input [12, 40] f32 (values exact in f16, as bitsandbytes wants), codes [12, 40] i8, absmax [12] f32, dequantised [12, 40] f32
golden/gguf/tiny.gguf + expected.safetensors: see `make_gguf`.
"""

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import torch
import transformers as hf

from common import GOLDEN, fresh, randn, save_tensors, token_ids


def nf4_by_definition(x):
    """Published definition (QLoRA, appendix E): nearest code of x / absmax per block of 64, ties to the lower code."""
    code = bnb.get_4bit_type("nf4", device="cpu").numpy()
    flat = x.flatten().numpy()
    blocks = [flat[i : i + 64] for i in range(0, flat.size, 64)]
    absmax = np.array([np.abs(b).max() for b in blocks], dtype=np.float32)
    scaled = np.concatenate([np.clip(b * (np.float32(1) / max(a, np.float32(1e-38))), -1, 1) for b, a in zip(blocks, absmax)])
    index = np.searchsorted((code[:-1] + code[1:]) / 2, scaled, side="left").astype(np.uint8)
    even = np.append(index, np.uint8(7)) if index.size % 2 else index
    packed = (even[::2] << 4) | even[1::2]
    restored = np.concatenate([code[index[i * 64 : (i + 1) * 64]] * a for i, a in enumerate(absmax)])
    return code, packed, absmax, restored.reshape(x.shape)


def nf4_case(x, prefix):
    """bitsandbytes' tensors for `x`, checked against the definition."""
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=False)
    restored = bnb.dequantize_4bit(packed, state)
    code, want, absmax, want_restored = nf4_by_definition(x)
    full = x.numel() // 2
    assert np.array_equal(packed.flatten().numpy()[:full], want[:full]) and np.array_equal(state.absmax.numpy(), absmax)
    assert np.allclose(restored.numpy(), want_restored, atol=1e-7, rtol=0)
    packed2, nested = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert torch.equal(packed, packed2) and torch.allclose(state.code, torch.from_numpy(code))
    second = bnb.dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
    return {
        f"{prefix}input": x, f"{prefix}code": state.code, f"{prefix}packed": packed.flatten(), f"{prefix}absmax": state.absmax,
        f"{prefix}dequantised": restored, f"{prefix}double.absmax": nested.absmax, f"{prefix}double.absmax2": nested.state2.absmax,
        f"{prefix}double.code": nested.state2.code, f"{prefix}double.offset": nested.offset.reshape(1),
        f"{prefix}double.restored_absmax": second, f"{prefix}double.dequantised": bnb.dequantize_4bit(packed2, nested),
    }


def make_bitsandbytes():
    """Write golden/quant."""
    fresh(GOLDEN / "quant")
    x = randn("quant/nf4", 24, 80) * torch.linspace(0.02, 2.0, 24).unsqueeze(1)
    x.view(-1)[5 * 64 : 6 * 64] = 0.0
    tail = {k: v for k, v in nf4_case(randn("quant/tail", 3, 25), "tail.").items() if not k.endswith("code")}
    save_tensors(GOLDEN / "quant" / "nf4.safetensors", nf4_case(x, "") | tail)
    x = (randn("quant/int8", 12, 40) * torch.linspace(0.05, 3.0, 12).unsqueeze(1)).half()
    codes, absmax, _ = bnb.int8_vectorwise_quant(x.clone())
    save_tensors(GOLDEN / "quant" / "int8.safetensors", {
        "input": x.float(), "codes": codes, "absmax": absmax, "dequantised": bnb.int8_vectorwise_dequant(codes, absmax).float(),
    })


Q = gguf.GGMLQuantizationType
# Hugging Face tensor suffix: (gguf name, block type). The mix covers every simple block type of llama.cpp.
LAYER = {
    "input_layernorm": ("attn_norm", Q.F32), "self_attn.q_proj": ("attn_q", Q.Q4_0), "self_attn.k_proj": ("attn_k", Q.Q4_1),
    "self_attn.v_proj": ("attn_v", Q.Q5_0), "self_attn.o_proj": ("attn_output", Q.Q5_1), "post_attention_layernorm": ("ffn_norm", Q.F32),
    "mlp.gate_proj": ("ffn_gate", Q.Q8_0), "mlp.up_proj": ("ffn_up", Q.Q4_0), "mlp.down_proj": ("ffn_down", Q.Q8_0),
}
TOP = {"model.embed_tokens": ("token_embd", Q.Q8_0), "model.norm": ("output_norm", Q.F32), "lm_head": ("output", Q.F16)}


def permute(w, heads):
    """llama.cpp's row order of q and k: each head's rows interleaved, for rope over adjacent pairs."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    """Back to Hugging Face's row order (rope over halves)."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def make_gguf():
    """Write golden/gguf: a llama of 2 layers (hidden 64, ff 96, 4 heads, 2 kv heads, vocab 64), no tokenizer section.

    expected.safetensors: ids [2, 12], logits [2, 12, 64] computed by transformers from the dequantised weights in Hugging
    Face's row order, and deq.<gguf name> [2, cols]: the first two dequantised rows of every tensor as stored (norms: whole).
    """
    folder = fresh(GOLDEN / "gguf")
    config = hf.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
    model = hf.LlamaForCausalLM(config).float().eval()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(64)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    expected = {}
    for key, p in model.named_parameters():
        module = key.removesuffix(".weight")
        if module in TOP:
            name, kind = TOP[module]
        else:
            _, _, layer, suffix = module.split(".", 3)
            name, kind = f"blk.{layer}.{LAYER[suffix][0]}", LAYER[suffix][1]
        noise = randn(f"gguf/{key}", *p.shape)
        if p.ndim == 1:
            w = (1 + 0.2 * noise).numpy()
        else:
            w = (noise * (0.6 if "embed" in key else 1.4 * 64**-0.5 if "q_proj" in key or "k_proj" in key else p.shape[1] ** -0.5)).numpy()
        heads = 4 if "q_proj" in key else 2 if "k_proj" in key else 0
        stored = gguf.quants.quantize(permute(w, heads) if heads else w, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        restored = gguf.quants.dequantize(stored, kind).astype(np.float32).reshape(w.shape)
        expected[f"deq.{name}.weight"] = torch.from_numpy(restored if p.ndim == 1 else restored[:2].copy())
        with torch.no_grad():
            p.copy_(torch.from_numpy((unpermute(restored, heads) if heads else restored).copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = token_ids("gguf/ids", 2, 12, 64)
    with torch.no_grad():
        expected |= {"ids": ids, "logits": model(input_ids=ids).logits}
    save_tensors(folder / "expected.safetensors", expected)
    print(f"gguf             logits std {expected['logits'].std():.3f}")


def make():
    """Write golden/quant and golden/gguf."""
    make_bitsandbytes()
    make_gguf()
