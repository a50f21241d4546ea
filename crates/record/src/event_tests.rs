use super::*;
use outboard_fit::trace::Op;

const COMMON: &str = "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;
\tfield:__data_loc char[] device;\toffset:8;\tsize:4;\tsigned:0;\n";
const NAME: &[u8; 16] = b"0000:01:00.0\0\0\0\0";

/// A printer whose fields follow the common ones: name, offset, size, whether located.
fn printer(name: &'static str, fields: &[(&str, usize, usize, bool)]) -> Printer {
    let mut text = COMMON.to_owned();
    for (field, offset, size, located) in fields {
        let kind = if *located { "__data_loc u64[]" } else { "u64" };
        text += &format!("\tfield:{kind} {field};\toffset:{offset};\tsize:{size};\tsigned:0;\n");
    }
    Printer::new(name, &Format::parse(&text)).expect("all fields are there")
}

/// A record's head: process 77, then the device's name at `at`.
fn head(at: u32) -> Vec<u8> {
    [1, 77, 16 << 16 | at].iter().flat_map(|word: &u32| word.to_le_bytes()).collect()
}

#[test]
fn a_page() {
    let fields = [
        ("phys_addr", 16, 8, false),
        ("dma_addr", 24, 8, false),
        ("size", 32, 8, false),
        ("dir", 40, 4, false),
        ("attrs", 48, 8, false),
    ];
    let printer = printer("dma_map_phys", &fields);
    let mut record = head(56);
    for value in [0, 0x1234_5000, 0xfff0_0000, 4096, 1, 1 << 5 | 1 << 10 | 1 << 20] {
        record.extend(u64::to_le_bytes(value));
    }
    record.drain(16 - 4..16);
    record.extend(NAME);
    let line = printer.line(3, 100_000_010_999, &record).expect("whole");
    assert_eq!(
        line,
        "<...>-77 [003] 100.000010: dma_map_phys: 0000:01:00.0 dir=TO_DEVICE dma_addr=fff00000 size=4096 \
         phys_addr=12345000 attrs=SKIP_CPU_SYNC|MMIO|0x100000\n"
    );
    for length in 0..record.len() - 16 {
        assert_eq!(printer.line(0, 0, &record[..length]), None, "cut at {length}");
    }
}

/// `dma_unmap_sg` of `count` pages.
fn unmap(count: u32) -> (Printer, Vec<u8>) {
    let printer = printer("dma_unmap_sg", &[("addrs", 12, 4, true), ("attrs", 16, 8, false)]);
    let mut record = head(24);
    record.extend((40 | (8 * count) << 16).to_le_bytes());
    record.extend(0u64.to_le_bytes());
    record.extend(NAME);
    record.extend((0..u64::from(count)).flat_map(|page| (page << 12).to_le_bytes()));
    (printer, record)
}

#[test]
fn lists_of_any_length() {
    for count in [0, 1, 3, 128, 500, 8191] {
        let (printer, record) = unmap(count);
        let line = printer.line(0, 0, &record).expect("whole");
        assert_eq!(line.matches("0x").count() as u32, count, "{count}");
        let last = count.checked_sub(1).map_or(String::new(), |last| format!("{:#x}", u64::from(last) << 12));
        assert!(line.contains(&format!("{last}}} attrs=")), "{count}");
    }
}

#[test]
fn a_cut_list_is_read_whole_by_fit() {
    let fields = [
        ("full_nents", 12, 4, false),
        ("full_ents", 16, 4, false),
        ("phys_addrs", 20, 4, true),
        ("dma_addrs", 24, 4, true),
        ("lengths", 28, 4, true),
        ("attrs", 32, 8, false),
    ];
    let map = printer("dma_map_sg", &fields);
    let mut record = head(40);
    let (physical, bus, lengths) = (56, 56 + 128 * 8, 56 + 256 * 8);
    for word in [300, 300, 1024 << 16 | physical, 1024 << 16 | bus, 512 << 16 | lengths, 0, 0] {
        record.extend(u32::to_le_bytes(word));
    }
    record.extend(NAME);
    for _ in 0..2 {
        record.extend((0..128u64).flat_map(|page| (page << 12).to_le_bytes()));
    }
    record.extend((0..128).flat_map(|_| 4096u32.to_le_bytes()));
    let text = map.line(0, 5000, &record).expect("whole");
    assert!(text.contains("nents=128/300 ents=128/300 [TRUNCATED] dma_addrs={0x0,"), "{text}");
    let (printer, record) = unmap(300);
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text + &printer.line(1, 9000, &record).expect("whole")).expect("written");
    let trace = outboard_fit::read(file.path(), None).expect("fit reads it");
    assert_eq!(trace.segments.len(), 300);
    assert!(matches!(trace.calls[1].op, Op::Unmap(0)), "{:?}", trace.calls[1]);
}

/// A length that no whole number of entries has: what was recorded is not known.
#[test]
fn a_list_with_half_an_entry_is_no_list() {
    let (printer, mut record) = unmap(2);
    record[12..16].copy_from_slice(&(40_u32 | 12 << 16).to_le_bytes());
    assert_eq!(printer.line(0, 0, &record), None);
}

#[test]
fn what_a_kernel_does_not_have_is_named() {
    let format = Format::parse(COMMON);
    assert_eq!(Printer::new("dma_map_page", &format).err(), Some("dma_addr"));
    let wanted = WANTED.map(|name| Printer::new(name, &format).is_err());
    assert!(wanted.iter().all(|failed| *failed));
}
