/// The key that starts a command to Outboard rather than to the guest: Ctrl-A, as in QEMU.
const ESCAPE: u8 = 0x01;

/// Shown for Ctrl-A h.
const HELP: &str = "\nCtrl-A x  leave: stops the virtual machine at once\n\
                    Ctrl-A Ctrl-A  send Ctrl-A to the guest\nCtrl-A h  this help";

/// Filters what is typed at a terminal.
#[derive(Debug, Default)]
pub(crate) struct Escape {
    pending: bool,
}

impl Escape {
    /// Appends to `out` what is meant for the guest; `true` if the user wants to leave, the rest is then dropped.
    pub(super) fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for &key in typed {
            if !std::mem::take(&mut self.pending) {
                if key == ESCAPE {
                    self.pending = true;
                } else {
                    out.push(key);
                }
                continue;
            }
            match key {
                b'x' => return true,
                b'h' | b'?' => outboard_cli::say!("{HELP}"),
                ESCAPE | b'a' => out.push(ESCAPE),
                // An unknown command was probably meant for the guest, its Ctrl-A too.
                other => out.extend([ESCAPE, other]),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut escape, mut out) = (Escape::default(), Vec::new());
        let left = pieces.iter().any(|piece| escape.filter(piece, &mut out));
        (out, left)
    }

    #[test]
    fn ctrl_a_x_leaves_even_in_two_reads() {
        assert_eq!(run(&[b"ab\x01", b"xcd"]), (b"ab".to_vec(), true));
    }

    #[test]
    fn everything_else_reaches_the_guest_ctrl_c_too() {
        assert_eq!(run(&[b"\x03x\x01\x01\x01zq"]), (b"\x03x\x01\x01zq".to_vec(), false));
    }
}
