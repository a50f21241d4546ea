//! `outboard fit` as its user sees it.

use std::path::Path;

use clap::Parser;
use outboard_fit::{Args, run};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

/// Its output, or its error.
pub fn fit(path: &Path, options: &[&str]) -> Result<String, String> {
    let path = path.to_str().expect("a name in UTF-8");
    let cli = Cli::try_parse_from([&["fit", path], options].concat()).map_err(|error| error.to_string())?;
    let mut out = Vec::new();
    run(&cli.args, &mut out).map_err(|error| error.to_string())?;
    Ok(String::from_utf8(out).expect("text"))
}

/// The same for a file with these bytes.
pub fn fit_bytes(bytes: &[u8], options: &[&str]) -> Result<String, String> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("test.trace");
    std::fs::write(&path, bytes).expect("written");
    fit(&path, options)
}

/// Entries, bytes mapped and bytes live at the peak with `policy`, and the rest of the output, as JSON has it.
pub fn figures(json: &str, policy: &str) -> ([u64; 3], serde_json::Value) {
    let json: serde_json::Value = serde_json::from_str(json).expect("JSON");
    let row = &json["policies"][policy];
    let number = |name: &str| row[name].as_u64().expect("a number");
    ([number("peak_entries"), number("peak_mapped_bytes"), number("peak_live_bytes")], json)
}

/// gzip of `bytes`.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).expect("packed");
    encoder.finish().expect("packed")
}

/// zstd of `bytes`, one frame.
pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}
