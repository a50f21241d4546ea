//! Files that people have: each is read right, or refused with its kind and what to do. Nothing is counted wrong in silence.

mod common;

use std::path::{Path, PathBuf};

use common::{figures, fit, fit_bytes, gzip, zstd};

/// Figures of `good.trace` with the windows policy: entries, bytes mapped, bytes live.
const GOOD: [u64; 3] = [4, 1 << 20, 50 * 4096];

/// Figures of one page.
const ONE: [u64; 3] = [1, 256 << 10, 4096];

fn input(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/inputs").join(name)
}

fn good() -> String {
    std::fs::read_to_string(input("good.trace")).expect("there")
}

/// The windows policy's figures of a file with `text`, and the caveats.
fn read(text: &[u8]) -> ([u64; 3], String) {
    let json = fit_bytes(text, &["--json"]).expect("read");
    let (figures, json) = figures(&json, "adaptive");
    let table = fit_bytes(text, &[]).expect("read");
    let caveats: Vec<&str> =
        json["caveats"].as_array().expect("a list").iter().filter_map(|c| c.as_str()).collect();
    for caveat in &caveats {
        assert!(table.contains(caveat), "the table has what JSON has: {caveat}");
    }
    // A head, a line for each policy, an empty line.
    assert_eq!(table.lines().count(), 2 + 3 + caveats.len() + 1, "{table}");
    (figures, caveats.join("; "))
}

fn refused(text: &[u8]) -> String {
    match fit_bytes(text, &[]) {
        Ok(table) => panic!("read: {table}"),
        Err(error) => error,
    }
}

/// A mapping of page `page` as the kernel prints it.
fn map(at: &str, page: u64) -> String {
    let start = page << 12;
    format!(
        "a-1 [000] ..... {at}: dma_map_page: dev dir=TO_DEVICE dma_addr={start:x} size=4096 phys_addr={start:x} attrs=\n"
    )
}

fn unmap(at: &str, page: u64) -> String {
    format!(
        "a-1 [000] ..... {at}: dma_unmap_page: dev dir=TO_DEVICE dma_addr={:x} size=4096 attrs=\n",
        page << 12
    )
}

#[test]
fn reported_inputs() {
    for name in [
        "good.trace",
        "crlf.trace",
        "interleaved.trace",
        "xz-two-streams.trace.xz",
        "failed-to-parse.trace",
        "name-cut-in-a-character.trace",
        "perf-script.trace",
        "packed.trace.gz",
    ] {
        let json = fit(&input(name), &["--json", "--device", "0000:01:00.0"]).expect(name);
        let (found, json) = figures(&json, "adaptive");
        assert_eq!(found, GOOD, "{name}");
        assert_eq!(json["lost_events"], 0, "{name}");
        assert_eq!(json["caveats"].as_array().map(Vec::len), Some(0), "{name}: {json}");
    }
    let (found, caveats) = read(&std::fs::read(input("events-dropped.trace")).expect("there"));
    assert_eq!(found, GOOD);
    assert!(caveats.contains("lost 41 events"), "{caveats}");
}

/// 20 pages in lists of two, 10 by themselves.
#[test]
fn lists_that_trace_cmd_could_not_parse() {
    let (_, json) = figures(&fit(&input("failed-to-parse-sg.trace"), &["--json"]).expect("read"), "none");
    let row = &json["policies"]["none"];
    assert_eq!(row["peak_entries"], 30, "{row}");
    assert_eq!(row["peak_live_bytes"], 30 * 4096);
    assert_eq!(row["host_calls"], 30 + 20, "the lists are unmapped");
    assert_eq!(json["caveats"].as_array().map(Vec::len), Some(0), "{json}");
}

/// Lists in the raw form of every event that has one, entries merged by an IOMMU among them.
#[test]
fn raw_lists() {
    let line = |at: &str, event: &str, fields: &str| {
        format!("a-1 [0] {at}: {event}: [FAILED TO PARSE] device=dev {fields} dir=1\n")
    };
    let pages = "ARRAY[00, 00, 00, 10, 00, 00, 00, 00, 00, 50, 00, 10, 00, 00, 00, 00]";
    let alloc = line(
        "1.0",
        "dma_alloc_sgt",
        &format!("phys_addrs={pages} dma_addr=268435456 size=8192 flags=3264 attrs=0x0"),
    );
    let free = line("1.1", "dma_free_sgt", &format!("phys_addrs={pages} dma_addr=268435456 size=8192"));
    let merged = line(
        "1.2",
        "dma_map_sg",
        &format!(
            "full_nents=2 full_ents=1 truncated=0 phys_addrs={pages} dma_addrs=ARRAY[00, 00, 00, ff, 00, 00, 00, 00] \
             lengths=ARRAY[00, 20, 00, 00] attrs=0x0"
        ),
    );
    let unmap = line("1.3", "dma_unmap_sg", &format!("addrs={pages} attrs=0x0"));
    let json = fit_bytes((alloc + &free + &merged + &unmap).as_bytes(), &["--json"]).expect("read");
    let ([entries, _, live], json) = figures(&json, "none");
    assert_eq!((entries, live), (2, 8192), "one after the other");
    assert_eq!(json["policies"]["none"]["host_calls"], 8);
    assert_eq!(json["caveats"].as_array().map(Vec::len), Some(0), "{json}");
}

#[test]
fn lists_that_are_not_in_the_text_are_said_to_be_missing() {
    let line = "x-1 [001] 1.5: dma_map_sg: [FAILED TO PARSE] device=dev full_nents=2 full_ents=2 truncated=0 phys_addrs=PRINTED \
                dma_addrs=ARRAY[00] lengths=ARRAY[00, 10, 00, 00] dir=1 attrs=0x0\n";
    for list in [
        "",
        "0x400038",
        "ARRAY[00, 10, 00]",
        "ARRAY[10000000]",
        "{1000}",
        "ARRAY[00, 00, 00, 10, 00, 00, 00, 0x]",
    ] {
        let said = refused(line.replace("PRINTED", list).as_bytes());
        assert!(said.contains("line 1") && said.contains("outboard record"), "{list}: {said}");
    }
    // More entries than were announced, or fewer.
    let text = "x-1 [001] 1.5: dma_map_sg: dev dir=NONE nents=NENTS ents=1/1 dma_addrs={0x1000} sizes={0x1000} phys_addrs={0x1000} attrs=\n";
    for nents in ["2/2", "1/99999999999", "1", "1/0", "-1/1"] {
        refused(text.replace("NENTS", nents).as_bytes());
    }
    assert_eq!(read(text.replace("NENTS", "1/1").as_bytes()).0[2], 4096);
}

#[test]
fn binary_files_are_refused_by_name() {
    let said = fit(&input("trace.dat"), &[]).expect_err("refused");
    assert!(said.contains("trace-cmd") && said.contains("trace-cmd report"), "{said}");
    let utf16: Vec<u8> = good().encode_utf16().flat_map(u16::to_le_bytes).collect();
    let marked = [&[0xff, 0xfe], &utf16[..]].concat();
    let mut tar = vec![b'x'; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    for (bytes, words) in [
        (&b"PERFILE2\x68\0\0\0"[..], &["perf.data", "perf script"][..]),
        (b"BZh91AY&SY", &["bzip2", "bunzip2"]),
        (b"\x04\x22\x4d\x18\x64@", &["lz4", "unlz4"]),
        (b"\x5d\0\0\x80\0", &["lzma", "unlzma"]),
        (b"PK\x03\x04\x14", &["zip", "unzip"]),
        (b"7z\xbc\xaf\x27\x1c\0", &["7-Zip"]),
        (b"\x7fELF\x02\x01", &["ELF"]),
        (b"%PDF-1.7\n", &["PDF"]),
        (b"\x89PNG\r\n", &["PNG"]),
        (b"\xc1\x1f\xfc\xc1", &["Common Trace Format"]),
        (&utf16, &["UTF-16", "iconv"]),
        (&marked, &["UTF-16", "iconv"]),
        (&tar, &["tar"]),
        (b"\x01\x02\0\x03", &["binary"]),
        (b"", &["empty"]),
        (b"hello\n", &["no DMA call", "trace-cmd report", "perf script"]),
    ] {
        for bytes in [bytes.to_vec(), gzip(bytes), zstd(bytes)] {
            let said = refused(&bytes);
            assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
        }
    }
    assert!(refused(&gzip(&gzip(b"m 1 1 1000:1000\n"))).contains("gzip file inside gzip"));
}

#[test]
fn packed_files_are_read_whole_or_refused() {
    let (first, second) = (good(), good());
    let (first, second) = (&first.as_bytes()[..4000], &second.as_bytes()[4000..]);
    // An empty frame to skip, as pzstd and others write.
    let skip = [&b"\x5a\x2a\x4d\x18\x03\0\0\0"[..], b"abc"].concat();
    for packed in [
        gzip(good().as_bytes()),
        [gzip(first), gzip(second)].concat(),
        zstd(good().as_bytes()),
        [skip.clone(), zstd(first), skip.clone(), zstd(second)].concat(),
    ] {
        assert_eq!(read(&packed), (GOOD, String::new()));
    }
    for (packed, name) in [(gzip(good().as_bytes()), "gzip"), (zstd(good().as_bytes()), "zstd")] {
        for cut in [packed.len() - 1, packed.len() / 2, 12] {
            let said = refused(&packed[..cut]);
            assert!(said.contains(name) && said.contains("cut"), "{said}");
        }
        let trailing = [&packed[..], b"more"].concat();
        assert!(refused(&trailing).contains("damaged"), "{name}");
        let mut damaged = packed;
        // The checksum: gzip's is followed by the length.
        let at = damaged.len() - if name == "gzip" { 8 } else { 4 };
        damaged[at] ^= 1;
        assert!(refused(&damaged).contains("damaged"), "{name}");
    }
    assert!(refused(&[&zstd(good().as_bytes())[..], &skip[..9]].concat()).contains("cut"));
}

#[test]
fn lost_events_in_every_form() {
    for (line, said) in [
        ("CPU:1 [41 EVENTS DROPPED]", "lost 41 events"),
        ("CPU:1 [EVENTS DROPPED]", "lost at least 1 events"),
        ("CPU:1 [LOST 41 EVENTS]", "lost 41 events"),
        ("CPU:1 [LOST EVENTS]", "lost at least 1 events"),
        ("# entries-in-buffer/entries-written: 100/141   #P:4", "lost 41 events"),
        ("# lost 41 events", "lost 41 events"),
        ("# the recorder was full: later calls are missing", "lost at least 1 events"),
        ("LOST 41 events!", "lost 41 events"),
        ("Xorg 812 [001]   100.000000: PERF_RECORD_LOST lost 41", "lost 41 events"),
        ("Processed 100 events and lost 7 chunks!", "lost at least 1 events"),
        ("dropped events: 41", "lost 41 events"),
        ("# lost 99999999999999999999999999 events", "lost 18446744073709551615 events"),
        ("a-1 [000] 1.0: dma_map_sg: dev dma_addrs={0x1000,[LINE TOO BIG]", "lost 1 events"),
    ] {
        let text = format!("{}{line}\n{}", map("1.0", 1), map("1.1", 2));
        let (figures, caveats) = read(text.as_bytes());
        assert_eq!(figures[2], 2 * 4096, "{line}");
        assert!(caveats.contains(said), "{line}: {caveats}");
        let json = fit_bytes(text.as_bytes(), &["--json"]).expect("read");
        assert!(!json.contains("\"lost_events\":0"), "{json}");
    }
    for line in [
        "CPU 2 is empty",
        "# entries-in-buffer/entries-written: 100/100   #P:4",
        "# command: echo lost 3 events",
    ] {
        assert_eq!(read(format!("{line}\n{}", map("1.0", 1)).as_bytes()).1, "", "{line}");
    }
}

#[test]
fn recordings_that_were_not_finished_say_so() {
    let begun = format!("# outboard record, Linux 6.18\n# command: x\n{}", map("1.0", 1));
    assert!(read(begun.as_bytes()).1.contains("did not finish"));
    let finished = format!("{begun}# lost 0 events\n");
    assert_eq!(read(finished.as_bytes()).1, "");
    assert_eq!(read(finished.trim_end().as_bytes()).1, "", "nothing can come behind its last line");
}

#[test]
fn a_last_line_that_was_cut() {
    let whole = map("1.0", 1) + &map("1.1", 2);
    let first = map("1.0", 1);
    for cut in first.len() + 1..whole.len() {
        let (figures, caveats) = read(&whole.as_bytes()[..cut]);
        let counted = cut == whole.len() - 1;
        assert_eq!(figures[2], if counted { 2 * 4096 } else { 4096 }, "{:?}", &whole[..cut]);
        assert!(caveats.contains(if counted { "has no end" } else { "left out" }), "{caveats}");
    }
    // Device memory, if its attribute were whole.
    let cut = whole.replace("attrs=\n", "attrs=SKIP_CPU_SYNC|MM");
    refused(cut.as_bytes());
    let ours = read(b"m 1 1 1000:1000\nu 2 1");
    assert!(ours.0[2] == 4096 && ours.1.contains("has no end"), "{ours:?}");
    assert!(read(b"m 1 1 1000:1000\nu 2 7").1.contains("left out"));
    assert!(read(b"m 1 1 1000:1000\nu 2").1.contains("left out"));
    assert!(refused(b"m 1 1 1000:1000\n\0\0\0\0").contains("line 2: zero bytes"));
}

#[test]
fn lines_that_run_into_each_other_are_refused() {
    let (first, second) = (map("1.0", 1), map("1.1", 2));
    for cut in ["size=4", "phys_addr=1", " attrs="] {
        let cut = first.find(cut).expect("there") + cut.len();
        let said = refused(format!("{}{second}", &first[..cut]).as_bytes());
        assert!(said.contains("line 1"), "{said}");
    }
    assert!(refused(b"m 1 1 1000:1000 m 2 2 3000:1000\n").contains("line 1"));
    assert!(refused(b"m 1 1 1000:1000\ru 2 1\r").contains("no DMA call"));
    assert!(refused(b"m 1 1 1000:1000\rm 2 2 2000:1000\r\n").contains("line 1"));
}

#[test]
fn devices_whose_names_have_spaces() {
    let text = (map("1.0", 1) + &map("1.1", 2)).replace(" dev ", " USB Host Controller 3 ")
        + &map("1.2", 3)
        + "a-1 [000] 1.3: dma_map_page: [FAILED TO PARSE] device=USB Host Controller 3 phys_addr=16384 dma_addr=16384 size=4096 dir=1 attrs=0x0\n";
    assert!(refused(text.as_bytes()).contains("USB Host Controller 3 (3), dev (1)"));
    let json = fit_bytes(text.as_bytes(), &["--json", "--device", "USB Host Controller 3"]).expect("read");
    assert_eq!(figures(&json, "none").0[2], 3 * 4096);
    assert!(refused(map("1.0", 1).replace(" dev ", " ").as_bytes()).contains("no device"));
}

#[test]
fn tasks_whose_names_are_odd() {
    for name in [
        "m",
        "u",
        "a: dma_map_page: b",
        "Web Content",
        "x 1.5: y",
        "CPU",
        "lost 3 events",
        "=",
        "\u{fffd}",
        "# ",
    ] {
        let text = format!(
            "    {name}-812 [001]   100.000000: dma:{}",
            map("", 1).split_once(": ").expect("there").1
        );
        assert_eq!(read(text.as_bytes()), (ONE, String::new()), "{name}");
    }
    for name in ["m", "u"] {
        let text =
            format!("{name}   812 [001]   100.000000: dma:{}", map("", 1).split_once(": ").expect("there").1);
        assert_eq!(read(text.as_bytes()).0[2], 4096, "{name}");
    }
}

#[test]
fn time_that_runs_back() {
    // Clocks of CPUs: what is unmapped earlier is unmapped, wherever its line stands.
    let text = map("1.000000", 1) + &map("1.000030", 2) + &unmap("1.000020", 1);
    assert_eq!(figures(&fit_bytes(text.as_bytes(), &["--json"]).expect("read"), "none").0[2], 4096);
    for text in [
        map("100.0", 1) + &map("98.9", 2),
        map("100.0", 1) + &map("0.0", 2),
        "m 5000000 1 1000:1000\nm 3 2 2000:1000\n".to_owned(),
        good() + &good(),
        good() + &good().replace("100.", "200.").replace("101.", "201."),
        "# tracer: nop\n".to_owned() + &map("1.0", 1) + "# tracer: nop\n" + &map("2.0", 2),
        "# outboard record, Linux 7\n".to_owned()
            + &map("1.0", 1)
            + "# lost 0 events\n# outboard record, Linux 7\n",
    ] {
        let said = refused(text.as_bytes());
        assert!(said.contains("recording") && said.contains("eplay each"), "{said}");
    }
    let both = map("1.0", 1) + "m 1 1 1000:1000\n";
    assert!(refused(both.as_bytes()).contains("two recordings"));
}

#[test]
fn numbers_that_are_too_large() {
    let line = map("1.0", 1);
    for (from, to) in [
        ("1.0:", "99999999999999999999.0:"),
        ("1.0:", "18446744073709551615.0:"),
        ("size=4096", "size=99999999999999999999"),
        ("size=4096", "size=0"),
        ("size=4096", "size=-1"),
        ("size=4096", "size=+1"),
        ("size=4096", "size=0x1000"),
        ("phys_addr=1000", "phys_addr=ffffffffffffffffff"),
        ("phys_addr=1000", "phys_addr=ffffffffffffffff"),
        ("phys_addr=1000", "phys_addr="),
        (" phys_addr=1000", ""),
        (" dma_addr=1000", ""),
    ] {
        assert_ne!(line.replace(from, to), line);
        let said = refused(line.replace(from, to).as_bytes());
        assert!(said.contains("line 1"), "{to}: {said}");
    }
    refused(b"m 99999999999999999999 1 1000:1000\n");
    assert_eq!(read(b"m 18446744073709551615 18446744073709551615 1000:1000\n").0[2], 4096);
}

#[test]
fn events_in_forms_that_are_not_read_are_refused() {
    let fields = map("", 1).split_once("dma_").expect("there").1.to_owned();
    for line in [
        format!("  Xorg-812     1d..1    10us : dma_{fields}"),
        format!("  Xorg-812     1d..1    123456: dma_{fields}"),
        format!("dma_{fields}"),
        format!("Xorg 812 [001] dma:dma_{fields}"),
        "     0.000 Xorg/812 dma:dma_map_page(device: \"dev\", phys_addr: 4096, dma_addr: 4096, size: 4096)\n".to_owned(),
        format!("a-1 [000] 1.0: \x1b[01;31m\x1b[Kdma_map_page\x1b[m\x1b[K: {}", fields.split_once(": ").expect("there").1),
        "[12:00:00.1] (+?) host dma:dma_map_page: { cpu_id = 1 }, { size = 4096 }\n".to_owned(),
        format!("a-1 [000] 1.0: dma_map_some_new_way: {}", fields.split_once(": ").expect("there").1),
    ] {
        let said = refused((map("1.0", 1) + &line).as_bytes());
        assert!(said.contains("line 2"), "{line}: {said}");
    }
    for line in [
        "a-1 [000] 1.0: sched_switch: nothing of ours",
        "a-1 [000] 1.0: dma_fence_init: driver=x timeline=y context=1 seqno=1",
        "a-1 [000] 1.0: dma_map_sg_err: dev dir=NONE dma_addrs={0x1} err=-5 attrs=",
        "a-1 [000] 1.0: dma_sync_single_for_cpu: dev dir=NONE dma_addr=1000 size=4096",
        "        ffffffff81 dma_map_page_attrs+0x10 ([kernel.kallsyms])",
        "  1)   0.5 us    |  dma_alloc_pages();",
    ] {
        assert_eq!(read(format!("{}{line}\n", map("1.0", 1)).as_bytes()), (ONE, String::new()), "{line}");
    }
}

#[test]
fn what_else_programs_put_into_a_line() {
    let line = map("1.000000", 1);
    for (from, to) in [
        ("1.000000: ", "1.000000123: "),
        ("1.000000: ", "1.000000: (+12)   "),
        ("1.000000: ", "1.000000:          1 "),
        ("..... ", ""),
        ("dma_map_page:", "dma:dma_map_page:"),
        ("dma_map_page:", "dma_map_page:        "),
        ("a-1 ", "\u{feff}a-1 "),
        ("attrs=", "attrs=0x20"),
        ("attrs=", "attrs=CACHE_CLEAN"),
        ("phys_addr=1000", "phys_addr=0x1000"),
    ] {
        assert_eq!(read(line.replace(from, to).as_bytes()).0, ONE, "{to}");
    }
    // Device memory is not mapped through windows.
    let both = |attributes: &str| line.clone() + &map("1.1", 2).replace("attrs=", attributes);
    for attributes in ["attrs=MMIO", "attrs=SKIP_CPU_SYNC|MMIO", "attrs=0x420"] {
        assert_eq!(read(both(attributes).as_bytes()).0[2], 4096, "{attributes}");
    }
    // What failed, as the C library prints a null pointer.
    let failed =
        "a-1 [000] 1.2: dma_alloc: dev dma_addr=8000 size=4096 virt_addr=(nil) flags=GFP_KERNEL attrs=\n";
    assert_eq!(read((line.clone() + failed).as_bytes()).0[2], 4096);
}

#[test]
fn what_is_uncertain_is_said() {
    let merged = "a-1 [000] 1.0: dma_map_sg: dev dir=NONE dma_addrs={0xd000} sizes={0x5000} phys_addrs={0x40000000,0x40008000} attrs=\n";
    let (figures, caveats) = read(merged.as_bytes());
    assert!(
        figures[2] >= 0x5000 && caveats.contains("2 entries of scatterlists are counted with even shares"),
        "{caveats}"
    );
    let exact = merged.replace("0x5000", "0x2000");
    assert_eq!(read(exact.as_bytes()), ([1, 256 << 10, 8192], String::new()));
    // Sizes of bus segments that hold more than the entries that are known.
    let entries: Vec<String> = (0..128).map(|i| format!("{:#x}", 0x4000_0000 + i * 0x10000)).collect();
    let entries = entries.join(",");
    let cut = format!(
        "a-1 [000] 1.0: dma_map_sg: dev dir=NONE nents=128/400 ents=128/200 [TRUNCATED] dma_addrs={{{entries}}} sizes={{{}}} \
         phys_addrs={{{entries}}} attrs=\n",
        ["0x2000"; 128].join(",")
    );
    let (figures, caveats) = read(cut.as_bytes());
    assert_eq!(figures[2], 128 * 4096);
    assert!(
        caveats.contains("272 entries of long") && caveats.contains("128 entries of scatterlists"),
        "{caveats}"
    );
    let alloc = "a-1 [000] 1.1: dma_alloc: dev dir=NONE dma_addr=fffff000 size=4096 virt_addr=1 flags=GFP_KERNEL attrs=\n";
    assert_eq!(read((map("1.0", 1) + alloc).as_bytes()).1, "");
    let translated = map("1.0", 1).replace("dma_addr=1000", "dma_addr=ffffe000") + alloc;
    let (_, caveats) = read(translated.as_bytes());
    assert!(caveats.contains("1 allocations are counted at their bus addresses"), "{caveats}");
    let (_, caveats) = read((map("1.0", 1) + &unmap("1.1", 2) + &unmap("1.2", 1)).as_bytes());
    assert!(caveats.contains("1 unmappings are of what was mapped before"), "{caveats}");
    let said = refused(unmap("1.0", 1).as_bytes());
    assert!(said.contains("1 unmappings and not one mapping"), "{said}");
}

#[test]
fn our_lines_are_all_read_or_refused() {
    for line in [
        "M 2 2 2000:1000",
        " m2 2 2 2000:1000",
        "map 2 2 2000:1000",
        "m",
        "mm 1",
        "# x\n- removed",
        "a-1 [0] 1.0: other: x",
    ] {
        let text = format!("m 1 1 1000:1000\n{line}\n");
        assert!(refused(text.as_bytes()).contains("line "), "{line}");
    }
    assert_eq!(read("\u{feff}m 1 1 1000:1000\n\n  \n# x\n@\n@ y\n  m 2 2 2000:1000\n".as_bytes()).0[2], 8192);
    assert_eq!(read(b"# caf\xe9\n@ caf\xe9\nm 1 1 1000:1000\n").0[2], 4096);
}
