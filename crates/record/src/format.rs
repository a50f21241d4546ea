//! `events/*/*/format` and `events/header_page`: where the fields of an event lie (Linux, `Documentation/trace/events.rst`).

/// Where a field lies in an event's record, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) offset: usize,
    pub(crate) size: usize,
    /// A `__data_loc`: the field holds offset (low half) and length (high half) of data elsewhere in the record.
    pub(crate) located: bool,
}

/// An event's number and fields.
#[derive(Clone, Debug, Default)]
pub(crate) struct Format {
    pub(crate) id: u16,
    fields: Vec<(String, Field)>,
}

impl Format {
    /// From the text of a `format` or `header_page` file. Lines it does not know are passed over.
    pub(crate) fn parse(text: &str) -> Self {
        let mut format = Self::default();
        for line in text.lines() {
            let line = line.trim();
            if let Some(id) = line.strip_prefix("ID:") {
                format.id = id.trim().parse().unwrap_or_default();
            } else if let Some((name, field)) = line.strip_prefix("field:").and_then(parse_field) {
                format.fields.push((name, field));
            }
        }
        format
    }

    pub(crate) fn field(&self, name: &str) -> Option<Field> {
        self.fields.iter().find(|(one, _)| one == name).map(|(_, field)| *field)
    }
}

/// `__data_loc char[] device; offset:8; size:4; signed:0;`
fn parse_field(text: &str) -> Option<(String, Field)> {
    let mut parts = text.split(';').map(str::trim);
    let declaration = parts.next()?;
    let (mut offset, mut size) = (None, None);
    for part in parts {
        match part.split_once(':') {
            Some(("offset", number)) => offset = number.parse().ok(),
            Some(("size", number)) => size = number.parse().ok(),
            _ => {}
        }
    }
    let name = declaration.rsplit(' ').next()?.split('[').next()?;
    let located = declaration.starts_with("__data_loc");
    Some((name.to_owned(), Field { offset: offset?, size: size?, located }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_file() {
        let text = "name: dma_unmap_sg\nID: 612\nformat:\n\
            \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
            \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
            \tfield:__data_loc char[] device;\toffset:8;\tsize:4;\tsigned:0;\n\
            \tfield:__data_loc u64[] addrs;\toffset:12;\tsize:4;\tsigned:0;\n\
            \tfield:unsigned long attrs;\toffset:24;\tsize:8;\tsigned:0;\n\n\
            print fmt: \"%s field:none;\", __get_str(device)\n";
        let format = Format::parse(text);
        assert_eq!(format.id, 612);
        assert_eq!(format.field("addrs"), Some(Field { offset: 12, size: 4, located: true }));
        assert_eq!(format.field("attrs"), Some(Field { offset: 24, size: 8, located: false }));
        assert_eq!(format.field("common_pid").map(|f| f.offset), Some(4));
        assert_eq!(format.field("none"), None);
    }
}
