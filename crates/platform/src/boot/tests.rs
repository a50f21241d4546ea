use super::*;
use proptest::prelude::*;
use std::io::Write;

const RAM: Range<u64> = 0x4000_0000..0x4000_0000 + (64 << 20);

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(RAM.start), (RAM.end - RAM.start) as usize)]).unwrap()
}

/// A flat Image of `len` bytes with recognisable contents, occupying `image_size` bytes of memory.
fn image(len: usize, image_size: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 256) as u8).collect();
    bytes[..64].fill(0);
    bytes[16..24].copy_from_slice(&image_size.to_le_bytes());
    bytes[24..32].copy_from_slice(&0xau64.to_le_bytes());
    bytes[56..60].copy_from_slice(b"ARM\x64");
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

fn zboot(name: &str, payload: &[u8], unpacked: usize) -> Vec<u8> {
    let mut bytes = vec![0; 0x200];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[4..8].copy_from_slice(b"zimg");
    bytes[8..12].copy_from_slice(&0x200u32.to_le_bytes());
    bytes[12..16].copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
    bytes[24..24 + name.len()].copy_from_slice(name.as_bytes());
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&(unpacked as u32).to_le_bytes());
    bytes
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn load_bytes(bytes: &[u8], initrd: Option<&[u8]>) -> Result<(GuestMemory, Loaded), BootError> {
    let (kernel, memory) = (file(bytes), memory());
    let kernel = Kernel::open(kernel.path())?;
    let initrd_file = initrd.map(file);
    let initrd = initrd_file.as_ref().map(|f| Initrd::open(f.path())).transpose()?;
    let loaded = load(&memory, &RAM, &kernel, initrd.as_ref())?;
    Ok((memory, loaded))
}

fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn every_format_puts_the_same_bytes_at_the_same_place() {
    let flat = image(3 << 20, 5 << 20);
    let formats = [
        (flat.clone(), KernelFormat::Image),
        (gzip(&flat), KernelFormat::GzipImage),
        (zboot("gzip", &gzip(&flat), flat.len()), KernelFormat::ZbootGzip),
        (zboot("zstd22", &zstd(&flat), flat.len()), KernelFormat::ZbootZstd),
        (zboot("zstd", &zstd(&flat), flat.len()), KernelFormat::ZbootZstd),
    ];
    for (bytes, format) in formats {
        let kernel = Kernel::open(file(&bytes).path()).unwrap();
        assert_eq!(kernel.format(), format);
        let (memory, loaded) = load_bytes(&bytes, Some(b"initrd!")).unwrap();
        assert_eq!(loaded.entry, RAM.start);
        assert_eq!(read(&memory, loaded.entry, flat.len()), flat, "{format}");
        assert_eq!(loaded.fdt, RAM.start + (6 << 20), "after the kernel's zeroed data, 2 MiB aligned");
        let initrd = loaded.initrd.unwrap();
        assert!(initrd.start >= loaded.fdt + FDT_SIZE);
        assert_eq!(read(&memory, initrd.start, 7), b"initrd!");
    }
}

#[test]
fn a_kernel_can_be_loaded_again_for_a_reboot() {
    for bytes in [image(1 << 20, 1 << 20), gzip(&image(1 << 20, 1 << 20))] {
        let kernel_file = file(&bytes);
        let initrd_file = file(b"again");
        let kernel = Kernel::open(kernel_file.path()).unwrap();
        let initrd = Initrd::open(initrd_file.path()).unwrap();
        let (first, second) = (memory(), memory());
        let loaded = load(&first, &RAM, &kernel, Some(&initrd)).unwrap();
        assert_eq!(load(&second, &RAM, &kernel, Some(&initrd)).unwrap(), loaded);
        let len = 12 << 20;
        assert_eq!(read(&first, RAM.start, len), read(&second, RAM.start, len));
    }
}

#[test]
fn files_that_are_no_arm64_kernel_are_named() {
    let mut bzimage = vec![0; 0x400];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let mut elf = vec![0; 0x400];
    elf[..4].copy_from_slice(b"\x7fELF");
    elf[18] = 62;
    let mut big_endian = image(4096, 4096);
    big_endian[24] |= 1;
    let cases: [(&[u8], &str); 7] = [
        (&bzimage, "x86 kernel"),
        (&elf, "x86-64 ELF"),
        (&[0; 4096], "no arm64 `Image`"),
        (b"short", "truncated"),
        (&gzip(&image(8192, 8192)[64..]), "no arm64 `Image`"),
        (&zboot("lzma", &[0; 64], 64), "lzma"),
        (&big_endian, "big-endian"),
    ];
    for (bytes, words) in cases {
        let message = Kernel::open(file(bytes).path()).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn damaged_payloads_are_refused() {
    let flat = image(300_000, 300_000);
    for (name, packed) in [("gzip", gzip(&flat)), ("zstd", zstd(&flat))] {
        let whole = zboot(name, &packed, flat.len());
        let cut = &whole[..whole.len() - 100];
        assert!(matches!(load_bytes(cut, None), Err(BootError::Truncated { .. })), "{name}");
        let mut damaged = whole.clone();
        let middle = 0x200 + packed.len() / 2;
        damaged[middle..middle + 64].fill(0xa5);
        assert!(matches!(load_bytes(&damaged, None), Err(BootError::Corrupt { .. })), "{name}");
    }
    let packed = gzip(&flat);
    assert!(matches!(load_bytes(&packed[..packed.len() / 2], None), Err(BootError::Corrupt { .. })));
}

#[test]
fn a_flat_image_shorter_than_its_efi_header_says_is_truncated() {
    let mut bytes = image(8192, 8192);
    bytes[..2].copy_from_slice(b"MZ");
    bytes[60..64].copy_from_slice(&0x80u32.to_le_bytes());
    bytes[0x80..0x84].copy_from_slice(b"PE\0\0");
    bytes[0x80 + 6..0x80 + 8].copy_from_slice(&1u16.to_le_bytes());
    bytes[0x80 + 20..0x80 + 22].copy_from_slice(&16u16.to_le_bytes());
    let section = 0x80 + 24 + 16;
    bytes[section + 16..section + 20].copy_from_slice(&4096u32.to_le_bytes());
    bytes[section + 20..section + 24].copy_from_slice(&4096u32.to_le_bytes());
    assert!(Kernel::open(file(&bytes).path()).is_ok());
    let error = Kernel::open(file(&bytes[..8000]).path()).unwrap_err();
    assert!(matches!(error, BootError::Truncated { needs: 8192, has: 8000, .. }), "{error}");
}

#[test]
fn what_does_not_fit_into_ram_says_so() {
    let too_big = image(4096, 1 << 40);
    assert!(matches!(load_bytes(&too_big, None), Err(BootError::NoRoom { .. })));
    let wraps = image(4096, u64::MAX);
    assert!(matches!(load_bytes(&wraps, None), Err(BootError::NoRoom { .. })));
    let initrd = vec![0; 63 << 20];
    let error = load_bytes(&image(4096, 2 << 20), Some(&initrd)).unwrap_err();
    assert!(error.to_string().contains("--memory"), "{error}");
}

#[test]
fn a_payload_that_unpacks_to_more_than_ram_is_refused() {
    let mut bomb = image(64 << 20, 4096);
    bomb[64..].fill(0);
    let message = load_bytes(&gzip(&bomb), None).unwrap_err().to_string();
    assert!(message.contains("--memory"), "{message}");
}

#[test]
fn missing_files_and_directories_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("vmlinuz");
    assert!(Kernel::open(&missing).unwrap_err().to_string().contains("vmlinuz"));
    assert!(matches!(Kernel::open(directory.path()), Err(BootError::NotAFile { .. })));
    assert!(matches!(Initrd::open(directory.path()), Err(BootError::NotAFile { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_file_makes_the_loader_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..2048),
        kind in 0..5,
    ) {
        if bytes.len() >= 64 {
            match kind {
                0 => bytes[56..60].copy_from_slice(b"ARM\x64"),
                1 => bytes[..2].copy_from_slice(&[0x1f, 0x8b]),
                2 | 3 => {
                    bytes[..8].copy_from_slice(b"MZ\0\0zimg");
                    bytes[24..29].copy_from_slice(if kind == 2 { b"gzip\0" } else { b"zstd\0" });
                    bytes[8..12].copy_from_slice(&64u32.to_le_bytes());
                    bytes[12..16].copy_from_slice(&500u32.to_le_bytes());
                }
                _ => {}
            }
        }
        let _ = load_bytes(&bytes, None);
    }
}
