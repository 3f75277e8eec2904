//! A disk that fills up at any byte leaves earlier files and folders whole.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;
use common::{Toy, fresh, perturb};
use espalier_adapters::formats::{atomic, folder};
use espalier_adapters::parametrisation::lora::Lora;
use espalier_adapters::{AdapterConfig, Error, MethodConfig};

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|e| (e.file_name().to_string_lossy().into_owned(), std::fs::read(e.path()).unwrap_or_default()))
        .collect()
}

fn is_full(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
        && error.hint().unwrap().contains("untouched")
}

#[test]
fn a_file_is_the_old_one_or_the_new_one() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("deep/file");
    let (old, new) = (vec![1u8; 700], vec![2u8; 1000]);
    atomic::write(&path, |out| out.write_all(&old)).unwrap();
    for limit in 0..=new.len() as u64 {
        let result = atomic::with_write_limit(limit, || {
            // In pieces, so that the limit falls between and within them.
            atomic::write(&path, |out| new.chunks(300).try_for_each(|piece| out.write_all(piece)))
        });
        let now = contents(path.parent().unwrap());
        assert_eq!(now.len(), 1, "limit {limit}: leftovers {:?}", now.keys());
        if limit < new.len() as u64 {
            assert!(is_full(&result.unwrap_err()), "limit {limit}");
            assert_eq!(now["file"], old, "limit {limit}");
        } else {
            result.unwrap();
            assert_eq!(now["file"], new);
        }
    }
}

#[test]
fn a_folder_is_the_old_one_or_the_new_one() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("folder");
    let fill = |sizes: &'static [usize], byte: u8| {
        move |at: &Path| -> Result<(), Error> {
            sizes.iter().enumerate().try_for_each(|(i, n)| {
                atomic::write(&at.join(format!("{byte}-{i}")), |out| out.write_all(&vec![byte; *n]))
            })
        }
    };
    atomic::replace_folder(&path, fill(&[10, 20, 0], 1)).unwrap();
    let old = contents(&path);
    const NEW: &[usize] = &[50, 1, 200];
    let total: u64 = NEW.iter().map(|n| *n as u64).sum();
    for limit in 0..=total {
        let result = atomic::with_write_limit(limit, || atomic::replace_folder(&path, fill(NEW, 2)));
        assert_eq!(contents(temp.path()).len(), 1, "limit {limit}: leftovers {:?}", contents(temp.path()).keys());
        if limit < total {
            assert!(is_full(&result.unwrap_err()), "limit {limit}");
            assert_eq!(contents(&path), old, "limit {limit}");
        } else {
            result.unwrap();
            let names: Vec<_> = contents(&path).into_iter().map(|(name, bytes)| (name, bytes.len())).collect();
            assert_eq!(names, [("2-0".to_owned(), 50), ("2-1".to_owned(), 1), ("2-2".to_owned(), 200)]);
        }
    }
    let failed = atomic::replace_folder(&path, |_| Err(Error::config("x", "given up")));
    assert!(failed.unwrap_err().to_string().contains("given up"));
    assert_eq!(contents(&path).len(), 3);
}

#[test]
fn an_adapter_saved_over_another_is_one_of_the_two() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("adapter");
    let adapter = |toy: &mut Toy, r: usize| {
        let made = fresh(toy, &AdapterConfig::new(MethodConfig::Lora(Lora { r, ..Lora::default() })), 1, DType::F32);
        perturb(&made, 2);
        made
    };
    let mut toy = Toy::new(DType::F32);
    let (small, large) = (adapter(&mut toy, 2), adapter(&mut toy, 5));
    folder::save(&mut toy, &small, &path).unwrap();
    std::fs::write(path.join("README.md"), "kept").unwrap();
    let old = contents(&path);
    let whole = temp.path().join("whole");
    folder::save(&mut toy, &large, &whole).unwrap();
    let new = contents(&whole);
    let total: u64 = new.values().map(|bytes| bytes.len() as u64).sum();
    let limits = (0..total).step_by(7).chain([total - 1]);
    for limit in limits {
        let result = atomic::with_write_limit(limit, || folder::save(&mut toy, &large, &path));
        assert!(is_full(&result.unwrap_err()), "limit {limit}");
        assert_eq!(contents(&path), old, "limit {limit} of {total}");
    }
    atomic::with_write_limit(total, || folder::save(&mut toy, &large, &path)).unwrap();
    let mut now = contents(&path);
    assert_eq!(now.remove("README.md").unwrap(), b"kept");
    assert_eq!(now, new);
}

#[test]
fn folders_that_cannot_be_written_are_named() {
    let temp = tempfile::tempdir().unwrap();
    let mut toy = Toy::new(DType::F32);
    let adapter = fresh(&mut toy, &AdapterConfig::new(MethodConfig::by_name("lora").unwrap()), 1, DType::F32);
    let file = temp.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let message = folder::save(&mut toy, &adapter, &file.join("adapter")).unwrap_err().to_string();
    assert!(message.contains("adapter"), "{message}");
    let message = atomic::replace_folder(&file.join("run"), |_| Ok::<(), Error>(())).unwrap_err().to_string();
    assert!(message.contains("run"), "{message}");
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
    let closed = temp.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    let mut mode = std::fs::metadata(&closed).unwrap().permissions();
    mode.set_readonly(true);
    std::fs::set_permissions(&closed, mode).unwrap();
    // Some users (root) may write anyway.
    if std::fs::write(closed.join("probe"), "x").is_err() {
        let message = folder::save(&mut toy, &adapter, &closed).unwrap_err().to_string();
        assert!(message.contains("closed"), "{message}");
        assert!(contents(&closed).is_empty());
    }
}
