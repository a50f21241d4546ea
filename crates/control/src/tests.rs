use super::*;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Says its name; a removal waits until the channel says something or is closed.
struct Vm {
    name: String,
    gate: Mutex<Option<Receiver<()>>>,
}

impl Handler for Vm {
    fn handle(&self, request: Request) -> Result<Answer, String> {
        match request {
            Request::Status => {
                Ok(Answer::Status(Box::new(VmStatus { name: self.name.clone(), ..Default::default() })))
            }
            Request::RemoveDevice { device, .. } => {
                let gate = self.gate.lock().unwrap().take();
                match gate.map(|gate| gate.recv()) {
                    Some(Ok(())) => Ok(Answer::Done(device)),
                    _ => Err("the machine has ended".into()),
                }
            }
            Request::AddDevice { device, .. } => Err(format!("no room for {device}")),
        }
    }
}

fn folder() -> (tempfile::TempDir, Folder) {
    let temp = tempfile::tempdir().unwrap();
    let folder = Folder::at(&temp.path().join("outboard"));
    (temp, folder)
}

fn start(folder: &Folder, name: Option<&str>) -> Result<(Server, Sender<()>), Error> {
    let (sender, gate) = channel();
    let handler = |name: &Name| {
        Arc::new(Vm { name: name.to_string(), gate: Mutex::new(Some(gate)) }) as Arc<dyn Handler>
    };
    Ok((Server::start(folder, name.map(|n| n.parse().unwrap()), handler)?, sender))
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn names(folder: &Folder) -> Vec<String> {
    running(folder)
        .unwrap()
        .into_iter()
        .map(|(name, status)| {
            assert_eq!(status.unwrap().name, name.to_string());
            name.to_string()
        })
        .collect()
}

#[test]
fn names_are_file_names() {
    for text in ["a", "vm1", "My-VM_2.old", "0"] {
        assert_eq!(name(text).as_str(), text);
    }
    let long = "x".repeat(33);
    for text in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\0", &long] {
        assert!(text.parse::<Name>().is_err(), "{text:?}");
    }
}

#[test]
fn vms_answer_and_are_listed_while_they_run() {
    let (_temp, folder) = folder();
    assert!(running(&folder).unwrap().is_empty(), "no folder, no VM");
    let (first, _a) = start(&folder, None).unwrap();
    let (second, _b) = start(&folder, None).unwrap();
    let (third, _c) = start(&folder, Some("web")).unwrap();
    assert_eq!((first.name().as_str(), second.name().as_str()), ("vm1", "vm2"));
    assert_eq!(names(&folder), ["vm1", "vm2", "web"]);
    assert!(matches!(start(&folder, Some("web")), Err(Error::Taken(_))));
    drop(first);
    assert_eq!(names(&folder), ["vm2", "web"]);
    let (again, _d) = start(&folder, None).unwrap();
    assert_eq!(again.name().as_str(), "vm1");
    drop((again, second, third));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    let gone = request(&folder, &name("web"), &Request::Status);
    assert!(matches!(gone, Err(Error::NotRunning(_))), "{gone:?}");
}

#[test]
fn what_a_killed_process_left_behind_is_no_vm_and_is_replaced() {
    let (_temp, folder) = folder();
    folder.create().unwrap();
    drop(UnixListener::bind(folder.socket(&name("vm1"))).unwrap());
    fs::write(folder.lock(&name("vm1")), "").unwrap();
    assert!(folder.socket(&name("vm1")).exists());
    assert!(names(&folder).is_empty());
    let (server, _gate) = start(&folder, Some("vm1")).unwrap();
    assert_eq!(names(&folder), ["vm1"]);
    drop(server);
}

#[test]
fn a_refusal_comes_in_the_vms_words() {
    let (_temp, folder) = folder();
    let (_server, gate) = start(&folder, Some("a")).unwrap();
    let add = Request::AddDevice { device: "01:00".into(), wait_s: 1 };
    let refused = request(&folder, &name("a"), &add);
    assert!(matches!(refused, Err(Error::Refused(why)) if why == "no room for 01:00"));
    gate.send(()).unwrap();
    let remove = Request::RemoveDevice { device: "01:00".into(), wait_s: 1 };
    assert_eq!(request(&folder, &name("a"), &remove).unwrap(), Answer::Done("01:00".into()));
}

#[test]
fn rubbish_is_answered_and_harms_nobody() {
    let (_temp, folder) = folder();
    let (_server, _gate) = start(&folder, Some("a")).unwrap();
    let long = vec![b'x'; 10_000];
    for (sent, answer) in [
        (&b"{}\n"[..], "not understood"),
        (b"\n", "not understood"),
        (b"\xff\xfe\n", "not understood"),
        (b"{\"request\":\"remove-device\",\"device\":\"x\",\"wait_s\":-1}\n", "not understood"),
        (&long, "longer than 4096 bytes"),
    ] {
        let mut stream = UnixStream::connect(folder.socket(&name("a"))).unwrap();
        stream.write_all(sent).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap_or_default();
        // A client that still sends when it is cut off may lose the reply.
        assert!(reply.contains(answer) || sent.len() > 4096 && reply.is_empty(), "{reply}");
    }
    assert_eq!(names(&folder), ["a"]);
}

#[test]
fn clients_that_hang_take_their_places_only_and_do_not_hold_up_the_end() {
    let (_temp, folder) = folder();
    let (server, _gate) = start(&folder, Some("a")).unwrap();
    let connect = || UnixStream::connect(folder.socket(&name("a"))).unwrap();
    let mut hanging: Vec<UnixStream> = (0..16).map(|_| connect()).collect();
    hanging[3].write_all(b"{\"requ").unwrap();
    let mut turned_away = connect();
    let mut reply = String::new();
    turned_away.read_to_string(&mut reply).unwrap();
    assert!(reply.contains("too many"), "{reply}");
    // The places are free again before anybody's patience is over: the clients left.
    drop(hanging);
    let answered = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        request(&folder, &name("a"), &Request::Status).is_ok()
    });
    assert!(answered);
    let _silent = connect();
    drop(server);
}

#[test]
fn a_request_under_way_is_answered_when_the_vm_ends() {
    let (_temp, folder) = folder();
    let (server, gate) = start(&folder, Some("a")).unwrap();
    std::thread::scope(|s| {
        let asked = s.spawn(|| {
            request(&folder, &name("a"), &Request::RemoveDevice { device: "x".into(), wait_s: 60 })
        });
        std::thread::sleep(Duration::from_millis(100));
        drop(gate);
        drop(server);
        let answer = asked.join().unwrap();
        assert!(matches!(&answer, Err(Error::Refused(why)) if why.contains("ended")), "{answer:?}");
    });
}

#[test]
fn a_folder_that_others_could_use_is_refused() {
    let (temp, folder) = folder();
    fs::create_dir(folder.path()).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(start(&folder, None), Err(Error::Unsafe { .. })));
    assert!(matches!(running(&folder), Err(Error::Unsafe { .. })));
    assert!(matches!(request(&folder, &name("a"), &Request::Status), Err(Error::Unsafe { .. })));
    let link = Folder::at(&temp.path().join("link"));
    let target = temp.path().join("target");
    fs::create_dir(&target).unwrap();
    fs::set_permissions(&target, fs::Permissions::from_mode(0o700)).unwrap();
    symlink(&target, link.path()).unwrap();
    assert!(matches!(start(&link, None), Err(Error::Unsafe { .. })), "a link is not followed");
}

#[test]
fn what_is_said_stays_the_same() {
    let json = |value: serde_json::Value| value.to_string();
    assert_eq!(json(serde_json::to_value(Request::Status).unwrap()), r#"{"request":"status"}"#);
    let remove: Request =
        serde_json::from_str(r#"{"request":"remove-device","device":"01:00","wait_s":5}"#).unwrap();
    assert_eq!(remove, Request::RemoveDevice { device: "01:00".into(), wait_s: 5 });
    let error = serde_json::to_value(Answer::Error("no".into())).unwrap();
    assert_eq!(json(error), r#"{"error":"no"}"#);
}
