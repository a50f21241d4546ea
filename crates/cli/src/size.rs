/// Bytes of a KiB.
pub const KIB: u64 = 1 << 10;
/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// Bytes from a number with an optional binary unit: `64K`, `64k`, `64KB` and `64KiB` are the same, M, G and T likewise. A number without a unit
/// counts `unit` bytes.
///
/// # Errors
/// What is wrong with it, for the user.
pub fn parse_size(text: &str, unit: u64) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, name) = text.split_at(end);
    let factor = match name.to_ascii_uppercase().as_str() {
        "" => unit,
        "K" | "KB" | "KIB" => KIB,
        "M" | "MB" | "MIB" => MIB,
        "G" | "GB" | "GIB" => 1 << 30,
        "T" | "TB" | "TIB" => 1 << 40,
        _ if digits.is_empty() => {
            return Err(format!("'{text}' is not a number with K, M, G or T, such as 512M"));
        }
        _ => return Err(format!("'{name}' is no unit; use K, M, G or T (powers of 1024)")),
    };
    if digits.is_empty() {
        return Err(format!("'{text}' has no number; write 512M, for example"));
    }
    let number: u64 = digits.parse().map_err(|_| too_large(text))?;
    number.checked_mul(factor).ok_or_else(|| too_large(text))
}

fn too_large(text: &str) -> String {
    format!("{text} is too large: it has more bytes than 64 bits count")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_whole_and_binary() {
        for (text, bytes) in [
            ("512", 512 * MIB),
            ("0", 0),
            ("64k", 64 * KIB),
            ("64KiB", 64 * KIB),
            ("256MB", 256 * MIB),
            ("2G", 2048 * MIB),
            ("3TiB", 3 << 40),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(parse_size(text, MIB), Ok(bytes), "{text}");
        }
        assert_eq!(parse_size("512", 1), Ok(512));
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "G",
            "iB",
            "512iB",
            "512B",
            "512BB",
            "2GBB",
            "2GiBiB",
            "2Gi",
            "-1G",
            "+1G",
            "1.5G",
            "2X",
            " 1",
            "1 ",
            "1 G",
            "0x10",
            "1_000",
            "16777216T",
            "18446744073709551616",
            "99999999999999T",
            "１",
        ] {
            assert!(parse_size(text, MIB).is_err(), "{text}");
        }
        assert!(parse_size("99999999999999T", MIB).unwrap_err().contains("too large"));
    }
}
