//! Packet headers (virtio 1.2, section 5.10.6).

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The host's context identifier.
pub const HOST_CID: u64 = 2;
/// The only type of socket offered.
pub const STREAM: u16 = 1;

/// Operations.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of `SHUTDOWN`: the sender of the packet will receive no more, send no more.
pub const NO_RECEIVE: u32 = 1;
pub const NO_SEND: u32 = 2;
pub const NO_BOTH: u32 = NO_RECEIVE | NO_SEND;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer so far; wraps.
    pub fwd_cnt: u32,
}

impl Header {
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let mut at = 0;
        let mut field = |width: usize| {
            let mut value = [0; 8];
            value[..width].copy_from_slice(&bytes[at..at + width]);
            at += width;
            u64::from_le_bytes(value)
        };
        Self {
            src_cid: field(8),
            dst_cid: field(8),
            src_port: field(4) as u32,
            dst_port: field(4) as u32,
            len: field(4) as u32,
            kind: field(2) as u16,
            op: field(2) as u16,
            flags: field(4) as u32,
            buf_alloc: field(4) as u32,
            fwd_cnt: field(4) as u32,
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut at = 0;
        let mut field = |value: u64, width: usize| {
            bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            at += width;
        };
        field(self.src_cid, 8);
        field(self.dst_cid, 8);
        field(self.src_port.into(), 4);
        field(self.dst_port.into(), 4);
        field(self.len.into(), 4);
        field(self.kind.into(), 2);
        field(self.op.into(), 2);
        field(self.flags.into(), 4);
        field(self.buf_alloc.into(), 4);
        field(self.fwd_cnt.into(), 4);
        bytes
    }

    /// The answer that there is no such connection.
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_where_the_standard_puts_them() {
        let mut bytes = [0; HEADER];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = i as u8;
        }
        let header = Header::from_bytes(&bytes);
        assert_eq!((header.src_cid, header.dst_port), (0x0706_0504_0302_0100, 0x1716_1514));
        assert_eq!((header.len, header.kind, header.op), (0x1b1a_1918, 0x1d1c, 0x1f1e));
        assert_eq!((header.flags, header.buf_alloc, header.fwd_cnt), (0x2322_2120, 0x2726_2524, 0x2b2a_2928));
    }

    proptest! {
        #[test]
        fn bytes_survive(bytes in proptest::collection::vec(any::<u8>(), HEADER)) {
            let bytes: [u8; HEADER] = bytes.try_into().unwrap();
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }
    }
}
