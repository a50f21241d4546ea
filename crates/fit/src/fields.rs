//! The fields of an event's line.

/// All fields of the `dma:*` events that map and unmap, as printed and in the record.
const KNOWN: [&str; 19] = [
    "device",
    "dir",
    "dma_addr",
    "size",
    "phys_addr",
    "virt_addr",
    "addr",
    "flags",
    "attrs",
    "nents",
    "ents",
    "dma_addrs",
    "sizes",
    "phys_addrs",
    "addrs",
    "lengths",
    "full_nents",
    "full_ents",
    "truncated",
];
const NOT_PARSED: &str = "[FAILED TO PARSE]";

/// `DEVICE name=value name=value`, or the raw form `[FAILED TO PARSE] device=DEVICE name=value`.
pub(crate) struct Fields<'l> {
    before: &'l str,
    pairs: Vec<(&'l str, &'l str)>,
    is_raw: bool,
}

impl<'l> Fields<'l> {
    /// Names of devices and values may have spaces in them; the names of fields tell where they end.
    pub(crate) fn parse(text: &'l str) -> Result<Self, String> {
        let text = text.trim();
        let (text, not_parsed) = match text.strip_prefix(NOT_PARSED) {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let begins = begins(text);
        let before = &text[..begins.first().map_or(text.len(), |(at, _)| *at)];
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for (index, (at, name)) in begins.iter().enumerate() {
            let end = begins.get(index + 1).map_or(text.len(), |(next, _)| *next);
            if pairs.iter().any(|(other, _)| other == name) {
                return Err(format!("{name} is there twice: two lines run into one"));
            }
            pairs.push((name, text[at + name.len() + 1..end].trim()));
        }
        let is_raw = not_parsed || pairs.iter().any(|(name, _)| *name == "device");
        Ok(Self { before: before.trim(), pairs, is_raw })
    }

    /// True if numbers without `0x` are decimal, and fields have the record's names.
    pub(crate) fn is_raw(&self) -> bool {
        self.is_raw
    }

    /// The device's name.
    pub(crate) fn device(&self) -> Result<&'l str, String> {
        let name = if self.is_raw { self.need("device")? } else { self.before };
        if name.is_empty() { Err("the event has no device".to_owned()) } else { Ok(name) }
    }

    pub(crate) fn text(&self, name: &str) -> Option<&'l str> {
        self.pairs.iter().find(|(one, _)| *one == name).map(|(_, value)| *value)
    }

    fn need(&self, name: &str) -> Result<&'l str, String> {
        self.text(name).ok_or_else(|| format!("the event has no {name}"))
    }

    /// A number which is printed to base `radix`, 10 or 16; raw ones are decimal, or say that they are not.
    pub(crate) fn number(&self, name: &str, radix: u32) -> Result<u64, String> {
        let text = self.need(name)?;
        let (digits, radix) = match (text.strip_prefix("0x"), self.is_raw, radix) {
            (Some(digits), true, _) | (Some(digits), false, 16) => (digits, 16),
            (None, true, _) => (text, 10),
            (_, false, _) => (text, radix),
        };
        let kind = if radix == 16 { "a hexadecimal number" } else { "a number" };
        // A sign would be taken too.
        let is_number = digits.chars().all(|c| c.is_digit(radix));
        let number = is_number.then(|| u64::from_str_radix(digits, radix).ok()).flatten();
        number.ok_or_else(|| format!("{name} is not {kind} of 64 bits: {text:?}"))
    }

    /// The same for a field that older kernels do not have.
    pub(crate) fn optional(&self, name: &str, radix: u32) -> Result<Option<u64>, String> {
        self.text(name).map(|_| self.number(name, radix)).transpose()
    }

    /// True for a pointer to nothing, as the kernel and the C library print it.
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.text(name) == Some("(nil)") || self.number(name, 16) == Ok(0)
    }

    /// `SHOWN/ALL`, where older kernels have nothing; `shown` is how many there are.
    pub(crate) fn part_of(&self, name: &str, shown: u64) -> Result<Option<u64>, String> {
        let Some(text) = self.text(name) else { return Ok(None) };
        // Behind it may stand [TRUNCATED].
        let counts = text.split(' ').next().unwrap_or_default().split_once('/');
        let number = |text: &str| text.parse::<u32>().ok().map(u64::from);
        match counts.map(|(some, all)| (number(some), number(all))) {
            Some((Some(some), Some(all))) if some == shown => Ok(Some(all)),
            Some((Some(some), Some(_))) => Err(format!("{some} {name} are announced and {shown} are there")),
            _ => Err(format!("{name} is not SHOWN/ALL: {text:?}")),
        }
    }

    /// `{0x1,0x2}`, as the kernel prints arrays, or `ARRAY[01, 00]`, the bytes of elements of `width` bytes.
    pub(crate) fn array(&self, name: &str, width: usize) -> Result<Vec<u64>, String> {
        let text = self.need(name)?;
        let within = |start: &str, end: char| text.strip_prefix(start)?.strip_suffix(end);
        let numbers = match (within("{", '}'), within("ARRAY[", ']')) {
            (Some(elements), _) => elements_of(elements),
            (_, Some(bytes)) => bytes_of(bytes, width),
            _ => None,
        };
        numbers.ok_or_else(|| format!("{name} is no array of numbers"))
    }
}

/// Where each field begins: its place and name.
fn begins(text: &str) -> Vec<(usize, &str)> {
    let mut begins = Vec::new();
    let mut at = 0;
    for word in text.split(' ') {
        match word.split_once('=') {
            Some((name, _)) if KNOWN.contains(&name) => begins.push((at, name)),
            _ => {}
        }
        at += word.len() + 1;
    }
    begins
}

fn elements_of(text: &str) -> Option<Vec<u64>> {
    if text.is_empty() { Some(Vec::new()) } else { text.split(',').map(element).collect() }
}

/// `0x1f`.
fn element(word: &str) -> Option<u64> {
    let digits = word.trim().strip_prefix("0x")?;
    let is_number = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_number.then(|| u64::from_str_radix(digits, 16).ok())?
}

/// Little-endian: every machine that has the events and a GPU is.
fn bytes_of(text: &str, width: usize) -> Option<Vec<u64>> {
    if text.is_empty() {
        return Some(Vec::new());
    }
    let bytes: Vec<u8> = text.split(',').map(byte).collect::<Option<_>>()?;
    let elements = bytes.chunks_exact(width);
    if !elements.remainder().is_empty() {
        return None;
    }
    Some(elements.map(|bytes| bytes.iter().rev().fold(0, |n, byte| (n << 8) | u64::from(*byte))).collect())
}

/// `1f`.
fn byte(word: &str) -> Option<u8> {
    let digits = word.trim();
    let is_byte = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_byte.then(|| u8::from_str_radix(digits, 16).ok())?
}
