use crate::address::{MTU, Subnet};
use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};
use std::net::Ipv4Addr;

/// One day. The address never goes to anybody else, so the length only sets how often the guest asks again.
const LEASE_SECONDS: u32 = 24 * 60 * 60;
/// Name given to the guest (option 12).
const HOST_NAME: &[u8] = b"outboard";
/// RFC 2132, interface MTU.
const OPTION_MTU: u8 = 26;
const OPTION_HOST_NAME: u8 = 12;

/// An answer to a DHCP client.
pub(crate) struct Reply {
    /// Bytes written to the buffer.
    pub(crate) len: usize,
    /// IP address to send to: the guest's own if it has one, else broadcast.
    pub(crate) to: Ipv4Addr,
}

/// Answers the DHCP message `request` of the only client there can be on `subnet` (RFC 2131, section 4.3) into `buffer`.
///
/// `None` for anything that needs no answer, malformed messages included.
pub(crate) fn answer(request: &[u8], subnet: Subnet, buffer: &mut [u8]) -> Option<Reply> {
    let (gateway, guest) = (subnet.gateway(), subnet.guest());
    let packet = DhcpPacket::new_checked(request).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    if request.server_identifier.is_some_and(|server| server != gateway) {
        return None; // The client chose another server.
    }
    let message_type = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => {
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            if wanted == guest { DhcpMessageType::Ack } else { DhcpMessageType::Nak }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let refused = message_type == DhcpMessageType::Nak;
    let inform = request.message_type == DhcpMessageType::Inform;
    let mtu = MTU.to_be_bytes();
    let options =
        [DhcpOption { kind: OPTION_MTU, data: &mtu }, DhcpOption { kind: OPTION_HOST_NAME, data: HOST_NAME }];
    let none = Ipv4Addr::UNSPECIFIED;
    let reply = DhcpRepr {
        message_type,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if refused { none } else { request.client_ip },
        your_ip: if refused || inform { none } else { guest },
        server_ip: if refused { none } else { gateway },
        router: (!refused).then_some(gateway),
        subnet_mask: (!refused).then_some(subnet.netmask()),
        relay_agent_ip: request.relay_agent_ip,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: request.client_identifier,
        server_identifier: Some(gateway),
        parameter_request_list: None,
        dns_servers: (!refused).then(|| [subnet.dns()].into_iter().collect()),
        max_size: None,
        // An answer to INFORM carries no lease (RFC 2131, section 4.3.5).
        lease_duration: (!refused && !inform).then_some(LEASE_SECONDS),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if refused { &[] } else { &options },
    };
    let len = reply.buffer_len();
    reply.emit(&mut DhcpPacket::new_unchecked(buffer.get_mut(..len)?)).ok()?;
    let has_address = request.client_ip == guest && !refused;
    Some(Reply { len, to: if has_address { guest } else { Ipv4Addr::BROADCAST } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{DNS, GATEWAY, GUEST};
    use proptest::prelude::*;
    use smoltcp::wire::EthernetAddress;

    fn message(message_type: DhcpMessageType) -> DhcpRepr<'static> {
        let none = Ipv4Addr::UNSPECIFIED;
        DhcpRepr {
            message_type,
            transaction_id: 0x1234_5678,
            secs: 0,
            client_hardware_address: EthernetAddress([2, 0, 0, 0, 0, 1]),
            client_ip: none,
            your_ip: none,
            server_ip: none,
            router: None,
            subnet_mask: None,
            relay_agent_ip: none,
            broadcast: false,
            requested_ip: None,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        }
    }

    fn bytes(repr: &DhcpRepr<'_>) -> Vec<u8> {
        let mut bytes = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
        bytes
    }

    /// Code and data of each option.
    type Options = Vec<(u8, Vec<u8>)>;

    /// The type, the address given, where it went, and the options of an answer.
    fn ask(repr: &DhcpRepr<'_>) -> Option<(DhcpMessageType, Ipv4Addr, Ipv4Addr, Options)> {
        let mut buffer = vec![0; 1024];
        let reply = answer(&bytes(repr), Subnet::DEFAULT, &mut buffer)?;
        let packet = DhcpPacket::new_checked(&buffer[..reply.len]).unwrap();
        let parsed = DhcpRepr::parse(&packet).unwrap();
        assert_eq!(parsed.transaction_id, 0x1234_5678);
        let options = packet.options().map(|o| (o.kind, o.data.to_vec())).collect();
        Some((parsed.message_type, parsed.your_ip, reply.to, options))
    }

    #[test]
    fn discover_request_renew() {
        let (kind, address, to, options) = ask(&message(DhcpMessageType::Discover)).unwrap();
        assert_eq!((kind, address, to), (DhcpMessageType::Offer, GUEST, Ipv4Addr::BROADCAST));
        for expected in [
            (1, vec![255, 255, 255, 0]),
            (3, GATEWAY.octets().to_vec()),
            (6, DNS.octets().to_vec()),
            (26, 65520u16.to_be_bytes().to_vec()),
            (12, b"outboard".to_vec()),
            (51, LEASE_SECONDS.to_be_bytes().to_vec()),
            (54, GATEWAY.octets().to_vec()),
        ] {
            assert!(options.contains(&expected), "{expected:?} in {options:?}");
        }

        let mut request = message(DhcpMessageType::Request);
        request.requested_ip = Some(GUEST);
        request.server_identifier = Some(GATEWAY);
        assert_eq!(ask(&request).unwrap().0, DhcpMessageType::Ack);

        let mut renew = message(DhcpMessageType::Request);
        renew.client_ip = GUEST;
        let (kind, address, to, _) = ask(&renew).unwrap();
        assert_eq!(
            (kind, address, to),
            (DhcpMessageType::Ack, GUEST, GUEST),
            "unicast to a client with an address"
        );
    }

    #[test]
    fn foreign_addresses_are_refused_and_foreign_servers_left_alone() {
        let mut request = message(DhcpMessageType::Request);
        request.requested_ip = Some(Ipv4Addr::new(192, 168, 1, 7));
        let (kind, address, to, _) = ask(&request).unwrap();
        assert_eq!((kind, address, to), (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST));
        request.server_identifier = Some(Ipv4Addr::new(192, 168, 1, 1));
        assert!(ask(&request).is_none());
    }

    #[test]
    fn inform_gets_options_but_no_lease_and_release_gets_nothing() {
        let mut inform = message(DhcpMessageType::Inform);
        inform.client_ip = GUEST;
        let (kind, address, to, options) = ask(&inform).unwrap();
        assert_eq!((kind, address, to), (DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED, GUEST));
        assert!(options.iter().any(|o| o.0 == 6) && options.iter().all(|o| o.0 != 51));
        assert!(ask(&message(DhcpMessageType::Release)).is_none());
        assert!(ask(&message(DhcpMessageType::Decline)).is_none());
    }

    proptest! {
        #[test]
        fn never_panics(mut request in proptest::collection::vec(any::<u8>(), 0..600), valid in any::<bool>()) {
            if valid && request.len() > 240 {
                let head = bytes(&message(DhcpMessageType::Discover));
                request[..240].copy_from_slice(&head[..240]);
            }
            let mut buffer = vec![0; 1024];
            if let Some(reply) = answer(&request, Subnet::DEFAULT, &mut buffer) {
                prop_assert!(reply.len <= buffer.len());
            }
        }
    }
}
