use crate::{Error, GICD_SIZE, GICR_STRIDE, GicConfig, MSI_DOORBELL, MSI_FRAME_SIZE, Result};

/// Alignment that GICv3 frames need on every back end (a Mac's framework asks for 64 KiB).
const FRAME_ALIGN: u64 = 0x1_0000;
/// SPIs are INTIDs 32 to 1019 (Arm IHI 0069, 2.2).
const FIRST_SPI: u32 = 32;
const LAST_SPI: u32 = 1019;

/// Checks the layout for a VM of `vcpus`, and gives base and bytes of its frames, for [`super::Mappings::reserve`].
///
/// # Errors
/// [`Error::Unsupported`] in the name of `backend`.
pub fn check_gic(backend: &'static str, config: &GicConfig, vcpus: u32) -> Result<[(u64, u64); 3]> {
    let refuse = |what| Err(Error::Unsupported { backend, what });
    let GicConfig { distributor, redistributors, msi_frame, ref msi_intids, intid_limit } = *config;
    if !intid_limit.is_multiple_of(32) || !(64..=1024).contains(&intid_limit) {
        return refuse(format!(
            "an interrupt limit of {intid_limit}: it must be a multiple of 32 from 64 to 1024"
        ));
    }
    let spis = FIRST_SPI..intid_limit.min(LAST_SPI + 1);
    if msi_intids.start > msi_intids.end || msi_intids.start < spis.start || msi_intids.end > spis.end {
        return refuse(format!("MSIs as interrupts {msi_intids:?}: they must be within the SPIs, {spis:?}"));
    }
    for (name, base) in
        [("distributor", distributor), ("redistributors", redistributors), ("MSI frame", msi_frame)]
    {
        if !base.is_multiple_of(FRAME_ALIGN) {
            return refuse(format!("the {name} at {base:#x}: it must be aligned to 64 KiB"));
        }
    }
    let redistributor_bytes = u64::from(vcpus) * GICR_STRIDE;
    Ok([(distributor, GICD_SIZE), (redistributors, redistributor_bytes), (msi_frame, MSI_FRAME_SIZE)])
}

/// Checks that `intid` is a line that [`crate::InterruptController::set_spi`] may drive.
///
/// # Errors
/// [`Error::NoSuchInterrupt`].
pub fn check_spi(config: &GicConfig, intid: u32) -> Result<()> {
    let spi = (FIRST_SPI..config.intid_limit.min(LAST_SPI + 1)).contains(&intid);
    if spi && !config.msi_intids.contains(&intid) { Ok(()) } else { Err(Error::NoSuchInterrupt { intid }) }
}

/// Checks a message for [`crate::InterruptController::send_msi`].
///
/// # Errors
/// [`Error::NoSuchInterrupt`].
pub fn check_msi(config: &GicConfig, address: u64, data: u32) -> Result<()> {
    if address == config.msi_frame + MSI_DOORBELL && config.msi_intids.contains(&data) {
        Ok(())
    } else {
        Err(Error::NoSuchInterrupt { intid: data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GicConfig {
        GicConfig {
            distributor: 0x800_0000,
            redistributors: 0x80a_0000,
            msi_frame: 0x802_0000,
            msi_intids: 128..192,
            intid_limit: 256,
        }
    }

    #[test]
    fn a_good_layout_has_three_frames() {
        let frames = check_gic("test", &config(), 4).unwrap();
        assert_eq!(frames, [(0x800_0000, 0x1_0000), (0x80a_0000, 0x8_0000), (0x802_0000, 0x1_0000)]);
    }

    #[test]
    fn bad_layouts_are_refused() {
        let bad: [fn(&mut GicConfig); 8] = [
            |c| c.distributor += 0x1000,
            |c| c.redistributors += 0x8000,
            |c| c.msi_frame += 1,
            |c| c.intid_limit = 255,
            |c| c.intid_limit = 32,
            |c| c.intid_limit = 1056,
            |c| c.msi_intids = 31..40,
            |c| c.msi_intids = 200..257,
        ];
        for (n, change) in bad.iter().enumerate() {
            let mut c = config();
            change(&mut c);
            assert!(matches!(check_gic("test", &c, 4), Err(Error::Unsupported { .. })), "change {n}");
        }
        let beyond_the_spis = GicConfig { intid_limit: 1024, msi_intids: 1000..1021, ..config() };
        assert!(check_gic("test", &beyond_the_spis, 4).is_err(), "1020 to 1023 are special");
    }

    #[test]
    fn lines_and_messages_keep_apart() {
        let c = config();
        for intid in [32, 127, 192, 255] {
            check_spi(&c, intid).unwrap();
            assert!(check_msi(&c, 0x802_0040, intid).is_err());
        }
        for intid in [0, 27, 31, 128, 191, 256, 1019, u32::MAX] {
            assert!(check_spi(&c, intid).is_err(), "{intid}");
        }
        check_msi(&c, 0x802_0040, 128).unwrap();
        assert!(check_msi(&c, 0x802_0044, 128).is_err());
    }
}
