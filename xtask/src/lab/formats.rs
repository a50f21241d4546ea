//! The other forms in which a kernel may come, made from a flat `Image`.

use crate::paths::Paths;
use crate::stamp;
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes `share/boot/{image-gzip,zboot-gzip,zboot-zstd}`.
pub fn prepare(paths: &Paths, image: &Path) -> Result<()> {
    let folder = paths.share().join("boot");
    let [gzip, zboot_gzip, zboot_zstd] =
        ["image-gzip", "zboot-gzip", "zboot-zstd"].map(|name| folder.join(name));
    let inputs = format!("1 {}", stamp::sum(&[image])?);
    stamp::once(paths, "boot-formats", &inputs, &[&gzip, &zboot_gzip, &zboot_zstd], || {
        let packed = filter(&["gzip", "-1", "-c"], image)?;
        stamp::write_whole(&zboot_gzip, &zboot("gzip", &packed)?)?;
        stamp::write_whole(&gzip, &packed)?;
        // What the kernel's own build calls zstd22; the size of the unpacked image follows the payload.
        let mut packed = filter(&["zstd", "-q", "-3", "-c"], image)?;
        packed.extend(u32::try_from(fs::metadata(image)?.len())?.to_le_bytes());
        stamp::write_whole(&zboot_zstd, &zboot("zstd", &packed)?)
    })?;
    Ok(())
}

fn filter(words: &[&str], input: &Path) -> Result<Vec<u8>> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(File::open(input)?).stderr(Stdio::inherit());
    let output = command.output().with_context(|| format!("cannot start {}", words[0]))?;
    ensure!(output.status.success(), "{} failed: {}", words[0], output.status);
    Ok(output.stdout)
}

/// An EFI zboot image (Linux, drivers/firmware/efi/libstub/zboot-header.S): what a loader that is no EFI firmware reads of it. 0: "MZ"; 4:
/// "zimg"; 8: the payload's offset; 12: its size; 24: the compression's name; 56: the magic of a Linux PE; 60: offset of
/// the PE header, which such a loader does not read.
fn zboot(compression: &str, payload: &[u8]) -> Result<Vec<u8>> {
    const HEADER: u32 = 4096;
    let mut image = vec![0; HEADER as usize];
    image[..2].copy_from_slice(b"MZ");
    image[4..8].copy_from_slice(b"zimg");
    image[8..12].copy_from_slice(&HEADER.to_le_bytes());
    image[12..16].copy_from_slice(&u32::try_from(payload.len())?.to_le_bytes());
    image[24..24 + compression.len()].copy_from_slice(compression.as_bytes());
    image[56..60].copy_from_slice(&[0xCD, 0x23, 0x82, 0x81]);
    image[60..64].copy_from_slice(&64_u32.to_le_bytes());
    image.extend_from_slice(payload);
    Ok(image)
}
