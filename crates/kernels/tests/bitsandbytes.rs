//! NF4 and int8 against bitsandbytes: code books, codes, scales and dequantised weights.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use espalier_kernels::frozen::{FrozenWeight, dynamic_map, nf4_code_book};
use std::collections::HashMap;
use std::path::Path;

fn golden(name: &str) -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden/quant").join(name);
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn floats(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn close(what: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let top = theirs.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= tolerance * top, "{what}: entry {i} is {a}, bitsandbytes has {b}");
    }
}

#[test]
fn nf4_is_that_of_bitsandbytes() {
    let g = golden("nf4.safetensors");
    close("code book", nf4_code_book(), &floats(&g["code"]), 1e-7);
    close("dynamic map", dynamic_map(), &floats(&g["double.code"]), 1e-7);
    // The second case ends within a block and within a byte.
    for prefix in ["", "tail."] {
        let at = |name: &str| &g[&format!("{prefix}{name}")];
        let input = at("input");
        let single = FrozenWeight::nf4(input, false).unwrap();
        let parts = single.nf4_parts().unwrap();
        let packed = at("packed").flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let values = input.elem_count();
        let nibble = |bytes: &[u8], i: usize| if i.is_multiple_of(2) { bytes[i / 2] >> 4 } else { bytes[i / 2] & 15 };
        for i in 0..values {
            assert_eq!(nibble(parts.codes, i), nibble(&packed, i), "{prefix}code {i}");
        }
        close("absmax", &parts.absmax, &floats(at("absmax")), 1e-6);
        close("dequantised", &floats(&single.dequantize(DType::F32).unwrap()), &floats(at("dequantised")), 1e-6);
        let double = FrozenWeight::nf4(input, true).unwrap();
        let parts = double.nf4_parts().unwrap();
        close("restored absmax", &parts.absmax, &floats(at("double.restored_absmax")), 1e-6);
        let theirs = floats(at("double.dequantised"));
        close("double dequantised", &floats(&double.dequantize(DType::F32).unwrap()), &theirs, 1e-6);
    }
}

#[test]
fn int8_is_that_of_bitsandbytes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden/quant/int8.safetensors");
    // candle has no signed bytes: the file's `codes` are compared through the dequantised values.
    let file = std::fs::read(path).unwrap();
    let tensors = candle_core::safetensors::SliceSafetensors::new(&file).unwrap();
    let load = |name: &str| tensors.load(name, &Device::Cpu).unwrap();
    let weight = FrozenWeight::int8(&load("input")).unwrap();
    let (_, absmax) = weight.int8_parts().unwrap();
    close("absmax", absmax, &floats(&load("absmax")), 1e-6);
    close("dequantised", &floats(&weight.dequantize(DType::F32).unwrap()), &floats(&load("dequantised")), 1e-6);
}
