//! The in-kernel GICv3.

#![allow(unsafe_code)] // UNSAFETY: KVM_SET_DEVICE_ATTR reads the attribute's value through a pointer.

use super::vm::VmShared;
use super::{eventfd, failed};
use crate::backend::{check_msi, check_spi};
use crate::{Error, GicConfig, InterruptController, Result};
use kvm_bindings::{
    KVM_ARM_IRQ_NUM_SHIFT, KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// INTID of the first SPI, which is number 0 of KVM's default interrupt routing.
const FIRST_SPI: u32 = 32;

/// Makes the GIC for the `vcpus` that exist already. (Linux Documentation/virt/kvm/devices/arm-vgic-v3.rst; the
/// redistributor region's value has the count in bits 63:52, the base in 51:16, its index in 11:0.)
pub fn create(vm: &VmFd, config: &GicConfig, vcpus: u32) -> Result<()> {
    let mut request =
        kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, ..kvm_create_device::default() };
    let gic = vm.create_device(&mut request).map_err(failed("KVM_CREATE_DEVICE for a GICv3"))?;
    let address = KVM_DEV_ARM_VGIC_GRP_ADDR;
    set(&gic, "distributor address", address, KVM_VGIC_V3_ADDR_TYPE_DIST, Some(&config.distributor))?;
    let region = u64::from(vcpus) << 52 | config.redistributors;
    set(&gic, "redistributor region", address, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, Some(&region))?;
    set(&gic, "number of interrupts", KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&config.intid_limit))?;
    set::<u64>(&gic, "initialization", KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)
    // The kernel keeps the device as long as the VM; its descriptor is of no more use.
}

fn set<T>(gic: &DeviceFd, what: &str, group: u32, attr: u32, value: Option<&T>) -> Result<()> {
    let addr = value.map_or(0, |v| std::ptr::from_ref(v) as u64);
    let attr = kvm_device_attr { flags: 0, group, attr: attr.into(), addr };
    gic.set_device_attr(&attr).map_err(failed(format!("KVM_SET_DEVICE_ATTR of the GICv3, {what}")))
}

/// Raises or lowers an SPI whose number was checked. KVM takes an edge at `true` only.
pub fn set_line(vm: &VmFd, intid: u32, level: bool) -> Result<()> {
    let irq = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | intid << KVM_ARM_IRQ_NUM_SHIFT;
    vm.set_irq_line(irq, level).map_err(|error| failed(format!("KVM_IRQ_LINE for interrupt {intid}"))(error))
}

/// The trait's view of the GIC.
pub struct KvmGic {
    pub vm: Arc<VmShared>,
    pub config: GicConfig,
}

impl KvmGic {
    fn bind(
        &self,
        intid: u32,
        event: BorrowedFd<'_>,
        resample: Option<BorrowedFd<'_>>,
        bind: bool,
    ) -> Result<()> {
        if !self.config.msi_intids.contains(&intid) {
            check_spi(&self.config, intid)?;
        }
        eventfd::irqfd(&self.vm.fd, intid - FIRST_SPI, event, resample, bind)
            .map_err(|source| Error::Host { call: format!("KVM_IRQFD for interrupt {intid}"), source })
    }
}

impl InterruptController for KvmGic {
    fn set_spi(&self, intid: u32, level: bool) -> Result<()> {
        check_spi(&self.config, intid)?;
        set_line(&self.vm.fd, intid, level)
    }

    fn send_msi(&self, address: u64, data: u32) -> Result<()> {
        check_msi(&self.config, address, data)?;
        set_line(&self.vm.fd, data, true)
    }

    fn bind_interrupt(&self, intid: u32, event: BorrowedFd<'_>) -> Result<()> {
        self.bind(intid, event, None, true)
    }

    fn unbind_interrupt(&self, intid: u32, event: BorrowedFd<'_>) -> Result<()> {
        self.bind(intid, event, None, false)
    }

    fn bind_level_interrupt(
        &self,
        intid: u32,
        trigger: BorrowedFd<'_>,
        resample: BorrowedFd<'_>,
    ) -> Result<()> {
        check_spi(&self.config, intid)?;
        self.bind(intid, trigger, Some(resample), true)
    }
}
