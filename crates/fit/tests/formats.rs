//! What is read and what is printed.

use std::path::{Path, PathBuf};

use clap::Parser;
use outboard_fit::trace::{Op, Trace};
use outboard_fit::{Args, Detail, Limits, Policy, ReadError, read, run};
use proptest::prelude::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Writes `text` where nobody else does, and reads it as a trace.
fn parse(text: &str, device: Option<&str>) -> Result<Trace, ReadError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.trace");
    std::fs::write(&path, text).unwrap();
    read(&path, device)
}

fn shape(trace: &Trace) -> Vec<String> {
    let line = |call: &outboard_fit::trace::Call| match &call.op {
        Op::Map(span) => {
            let list: Vec<_> =
                trace.segments[span.clone()].iter().map(|s| format!("{:x}:{:x}", s.start, s.len)).collect();
            format!("{} m {}", call.at, list.join(","))
        }
        Op::Unmap(index) => format!("{} u {index}", call.at),
        Op::Marker(index) => format!("{} @ {}", call.at, trace.markers[*index]),
    };
    trace.calls.iter().map(line).collect()
}

#[test]
fn our_format_is_read_packed_and_plain() {
    let packed = read(&data("tiny.trace.xz"), None).unwrap();
    assert_eq!(packed.name, "tiny");
    let expected = [
        "0 @ begin",
        "10 m 100000000:1000,100004000:2000",
        "20 m 100001000:1000",
        "30 u 1",
        "40 u 2",
        "40 @ end",
    ];
    assert_eq!(shape(&packed), expected);
    let plain = "m 5 1 1000:1000\r\nu 4 1\n";
    assert_eq!(shape(&parse(plain, None).unwrap()), ["5 m 1000:1000", "5 u 0"], "time never runs back");
}

#[test]
fn damage_is_reported_with_its_line() {
    for (text, line, what) in [
        ("m 1 1 1000:1000\nm 2 1 1000:1000\n", 2, "mapped already"),
        ("m 1 1 1000:1000\nu 2 7\n", 2, "not mapped"),
        ("# x\nm x 1 1000:1000\n", 2, "time"),
        ("m 1 1\n", 1, "ADDRESS:LENGTH"),
        ("m 1 1 1000\n", 1, "ADDRESS:LENGTH"),
        ("m 1 1 1000:0\n", 1, "empty"),
        ("m 1 1 ffffffffffffffff:2\n", 1, "52 bits"),
    ] {
        match parse(text, None) {
            Err(ReadError::Line { line: at, what: said, .. }) => {
                assert_eq!(at, line, "{text}");
                assert!(said.contains(what), "{text}: {said}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    let packed = std::fs::read(data("tiny.trace.xz")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    std::fs::write(&path, &packed[..packed.len() / 2]).unwrap();
    let said = read(&path, None).unwrap_err().to_string();
    assert!(said.contains("cut"), "{said}");
    assert!(matches!(parse("nothing here\n", None), Err(ReadError::Empty(_))));
    assert!(matches!(read(Path::new("generated:nonsense"), None), Err(ReadError::Generated(_))));
    assert!(matches!(read(Path::new("no/such/file"), None), Err(ReadError::Io { .. })));
}

/// As `include/trace/events/dma.h` of Linux 6.12 to 7.x prints them.
const EVENTS: &str = "\
# tracer: nop
     Xorg-812     [001] d..1.   100.000010: dma_map_page: 0000:01:00.0 dir=BIDIRECTIONAL dma_addr=fff00000 size=4096 phys_addr=12345000 attrs=SKIP_CPU_SYNC
     Xorg-812     [001] .....   100.000020: dma_map_phys: 0000:01:00.0 dir=TO_DEVICE dma_addr=fe000000 size=65536 phys_addr=e0000000 attrs=MMIO
     Xorg-812     [001] .....   100.000030: dma_alloc: 0000:01:00.0 dir=BIDIRECTIONAL dma_addr=22000000 size=100 virt_addr=0000000012345678 flags=GFP_KERNEL attrs=
     Xorg-812     [000] .....   100.000040: dma_map_sg: 0000:01:00.0 dir=BIDIRECTIONAL nents=2/3 ents=2/3 [TRUNCATED] dma_addrs={0xa000,0xc000} sizes={0x1000,0x2000} phys_addrs={0x30000000,0x30010000} attrs=
     Xorg-812     [000] .....   100.000050: dma_sync_sg_for_cpu: 0000:01:00.0 dir=FROM_DEVICE dma_addrs={0xa000} sizes={0x1000}
     Xorg-812     [000] .....   100.000055: dma_map_sg: 0000:01:00.0 dir=BIDIRECTIONAL dma_addrs={0xd000} sizes={0x2000} phys_addrs={0x40000000,0x40001000} attrs=
     Xorg-812     [000] .....   100.000060: dma_unmap_sg: 0000:01:00.0 dir=BIDIRECTIONAL phys_addrs={0x30000000,0x30010000,0x30020000} attrs=
     Xorg-812     [001] .....   100.000070: dma_unmap_phys: 0000:01:00.0 dir=BIDIRECTIONAL dma_addr=fff00000 size=4096 attrs=
     Xorg-812     [001] .....   100.000080: dma_unmap_page: 0000:01:00.0 dir=BIDIRECTIONAL dma_addr=77000000 size=4096 attrs=
     Xorg-812     [001] .....   100.000090: dma_free: 0000:01:00.0 dir=BIDIRECTIONAL dma_addr=22000000 size=100 virt_addr=0000000012345678 attrs=
     Xorg-812     [001] .....   100.000091: sched_switch: nothing of ours
";

#[test]
fn kernel_events_are_read() {
    let trace = parse(EVENTS, None).unwrap();
    let expected = [
        "100000010 m 12345000:1000",
        "100000030 m 22000000:1000",
        // The third entry was cut; the unmapping has it.
        "100000040 m 30000000:1000,30010000:2000,30020000:1000",
        // Merged on the bus by an IOMMU.
        "100000055 m 40000000:1000,40001000:1000",
        "100000060 u 2",
        "100000070 u 0",
        "100000090 u 1",
    ];
    assert_eq!(shape(&trace), expected);
}

/// What a driver was refused is not mapped; what was lost is said.
#[test]
fn failures_and_losses_of_a_recording() {
    let text = "\
a-1 [0] ..... 1.0: dma_map_page: d dir=NONE dma_addr=ffffffffffffffff size=4096 phys_addr=1000 attrs=
a-1 [0] ..... 2.0: dma_alloc: d dir=NONE dma_addr=5000 size=4096 virt_addr=0000000000000000 flags=GFP_KERNEL attrs=
a-1 [0] ..... 3.0: dma_alloc_sgt: d dir=NONE dma_addr=0 size=8192 phys_addrs={0x6000,0x9000} flags=GFP_KERNEL attrs=
CPU:1 [LOST 40 EVENTS]
a-1 [0] ..... 4.0: dma_free_sgt: d dir=NONE dma_addr=0 size=8192 phys_addrs={0x6000,0x9000}
a-1 [0] ..... 5.0: dma_map_phys: d dir=TO_DEVICE dma_addr=7000 size=16 phys_addr=7ff8 attrs=
# lost 2 events
";
    let trace = parse(text, None).unwrap();
    assert_eq!(shape(&trace), ["3000000 m 6000:1000,9000:1000", "4000000 u 0", "5000000 m 7ff8:10"]);
    assert_eq!(trace.gaps.lost, 42);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lossy.trace");
    std::fs::write(&path, text).unwrap();
    let (_, table) = fit(&[path.to_str().unwrap()]);
    assert!(table.contains("lost 42 events"), "{table}");
    assert!(!fit(&[data("tiny.trace.xz").to_str().unwrap()]).1.contains("lost"));
}

/// The kernel records no event larger than a page of its buffer: such unmappings are concluded, and what is unknown is said.
#[test]
fn lists_whose_unmapping_the_kernel_cannot_record() {
    let map = |at: u32, first: u32, full: u32| {
        let list = |step: u32| {
            (0..128).map(|i| format!("{:#x}", (first + i * step) << 12)).collect::<Vec<_>>().join(",")
        };
        format!(
            "a-1 [0] ..... {at}.0: dma_map_sg: d dir=NONE nents=128/{full} ents=128/{full} [TRUNCATED] dma_addrs={{{0}}} sizes={{{1}}} phys_addrs={{{0}}} attrs=\n",
            list(1),
            ["0x1000"; 128].join(",")
        )
    };
    let single = |at: u32, page: u32| {
        format!(
            "a-1 [0] ..... {at}.0: dma_map_page: d dir=NONE dma_addr={0:x} size=4096 phys_addr={0:x} attrs=\n",
            page << 12
        )
    };
    // Long: mapped again in part, so it was unmapped.
    let trace = parse(&(map(1, 1000, 4096) + &single(2, 1005) + &map(3, 1000, 4096)), None).unwrap();
    let kinds: Vec<bool> = trace.calls.iter().map(|call| matches!(call.op, Op::Unmap(0))).collect();
    assert_eq!(kinds, [false, true, false, false], "unmapped before its page is mapped again, once");
    assert_eq!(trace.gaps.missing, 2 * (4096 - 128));
    // Shorter ones say so themselves.
    let trace = parse(&(map(1, 1000, 200) + &single(2, 1005)), None).unwrap();
    assert!(trace.calls.iter().all(|call| matches!(call.op, Op::Map(_))));
    let unmap = (0..200).map(|i| format!("{:#x}", (1000 + i) << 12)).collect::<Vec<_>>().join(",");
    let unmap = format!("a-1 [0] ..... 3.0: dma_unmap_sg: d dir=NONE phys_addrs={{{unmap}}} attrs=\n");
    let trace = parse(&(map(1, 1000, 200) + &unmap), None).unwrap();
    assert_eq!((trace.gaps.missing, trace.segments.len()), (0, 200));
}

#[test]
fn devices_are_told_apart() {
    let two = EVENTS.to_owned() + &EVENTS.replace("# tracer: nop\n", "").replace("01:00.0", "02:00.0");
    let error = parse(&two, None).unwrap_err().to_string();
    assert!(error.contains("--device") && error.contains("0000:02:00.0 (7)"), "{error}");
    assert_eq!(parse(&two, Some("0000:02:00.0")).unwrap().calls.len(), 7);
    assert!(matches!(parse(&two, Some("0000:03:00.0")), Err(ReadError::NoDevice { .. })));
}

fn fit(args: &[&str]) -> (bool, String) {
    let cli = Cli::try_parse_from([&["fit"], args].concat()).expect("arguments");
    let mut out = Vec::new();
    let fits = run(&cli.args, &mut out).expect("run");
    (fits, String::from_utf8(out).unwrap())
}

#[test]
fn json_has_the_promised_shape() {
    let path = data("tiny.trace.xz");
    let (fits, text) = fit(&[path.to_str().unwrap(), "--json", "--tightest"]);
    assert!(fits);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["trace"], "tiny");
    assert_eq!(json["lost_events"], 0);
    assert_eq!(json["missing_entries"], 0);
    assert_eq!(json["caveats"], serde_json::json!([]));
    assert_eq!(json.as_object().unwrap().len(), 5);
    for (policy, entries, bytes) in
        [("adaptive", 1, 16384 * 2), ("fixed-256k", 1, 262_144), ("none", 2, 16384 * 2)]
    {
        let row = &json["policies"][policy];
        assert_eq!(row["peak_live_bytes"], 0x4000, "{policy}");
        assert_eq!(row["fits"], true);
        assert_eq!(row["tightest_entries"], entries, "{policy}");
        assert_eq!(row["tightest_bytes"], bytes, "{policy}");
        let keys = ["peak_entries", "peak_mapped_bytes", "host_calls", "host_round_trips"];
        assert!(keys.iter().all(|key| row[key].is_u64()), "{row}");
        assert_eq!(row.as_object().unwrap().len(), 8);
    }
}

#[test]
fn what_does_not_fit_says_when_and_why() {
    let path = data("tiny.trace.xz");
    let (fits, text) = fit(&[path.to_str().unwrap(), "--limit-bytes", "16K"]);
    assert!(!fits);
    assert!(text.contains("does not fit: call 1 at 0.000 s after \"begin\""), "{text}");
    assert!(text.contains("the byte budget is used up"), "{text}");
}

#[test]
fn plots_are_well_formed() {
    let folder = tempfile::tempdir().unwrap();
    let (path, plot) = (data("tiny.trace.xz"), folder.path().join("plot.svg"));
    fit(&[path.to_str().unwrap(), "--plot", plot.to_str().unwrap()]);
    let svg = std::fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("<polyline ").count(), 6, "entries and bytes of three policies");
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
}

#[test]
fn numbers_that_no_kernel_prints_are_refused() {
    for event in [
        "dma_alloc: dev dma_addr=1000 size=18446744073709551615 virt_addr=1 attrs=",
        "dma_alloc_sgt: dev dma_addr=1000 size=18446744073709551615 phys_addrs={0x1000} attrs=",
        "dma_map_page: dev dma_addr=1000 size=18446744073709551615 phys_addr=1000 attrs=",
    ] {
        let said = parse(&format!("x 1.5: {event}\n"), None).unwrap_err().to_string();
        assert!(said.contains("52 bits"), "{said}");
    }
    let free = "x 1.5: dma_map_page: dev dma_addr=1000 size=4096 phys_addr=1000 attrs=\n\
        x 1.6: dma_free: dev dma_addr=1000 size=18446744073709551615 virt_addr=1 attrs=\n";
    assert_eq!(parse(free, None).unwrap().calls.len(), 1, "what was never mapped is passed over");
}

/// Two pieces of RAM 64 TiB apart, as a host with two sockets has them, and more pieces than a guest may have.
#[test]
fn ram_in_pieces_is_replayed_and_too_much_of_it_refused() {
    let replay = |text: &str| {
        let trace = parse(text, None).unwrap();
        outboard_fit::replay(&trace, Policy::all()[0], Limits::MAC, Detail::Counts)
    };
    let far = "m 1 1 80000000:1000\nm 2 2 400000000000:1000,4000f0000000:1000\nu 3 1\n";
    assert_eq!(replay(far).unwrap().failures, 0);
    let many: String = (0..20_u64).map(|i| format!("m {i} {i} {:x}:1000\n", (i * i) << 30)).collect();
    assert_eq!(replay(&many).unwrap().failures, 0);
    let scattered: String = (0..20_u64).map(|i| format!("m {i} {i} {:x}:1000\n", i << 44)).collect();
    assert!(replay(&scattered).unwrap_err().to_string().contains("too far apart"));
    assert!(replay("m 1 1 0:ffffffffff000\n").is_err());
}

#[test]
fn limits_are_checked() {
    for bad in ["1", "0", "16X", "-1", "999999999999G", ""] {
        assert!(Cli::try_parse_from(["fit", "x", "--limit-bytes", bad]).is_err(), "{bad}");
    }
    assert!(Cli::try_parse_from(["fit", "x", "--limit-entries", "0"]).is_err());
    assert!(Cli::try_parse_from(["fit"]).is_err());
}

proptest! {
    /// No text makes the reader panic.
    #[test]
    fn any_text_is_read_or_refused(lines in prop::collection::vec(
        prop_oneof![
            "[mu@#] [0-9]{1,4} [0-9]{1,2} [0-9a-f]{1,16}:[0-9a-f]{1,16}",
            "x 1.5: dma_(un)?map_(sg|phys|page): dev (dma_addr|size|phys_addrs|sizes)=[{}0-9a-fx,]{0,12} (phys_addr|sizes|size)=[{}0-9a-f,]{0,9}",
            ".{0,40}",
        ], 0..12,
    )) {
        let _ = parse(&lines.join("\n"), None);
    }
}
