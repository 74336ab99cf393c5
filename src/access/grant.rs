//! What an authenticated caller may do. One place decides, and [`Permit`] is its only product.

use std::marker::PhantomData;
use std::sync::{Arc, LazyLock};

use super::{Circumstances, Forbidden, Principal, ServiceContext};
use crate::audit::Who;
use crate::tenant::{PrincipalId, TenantId, Verb};

/// Leave to do one kind of thing for one tenant. It cannot be made outside this room.
pub struct Permit<V> {
    principal: Arc<Principal>,
    tenant: TenantId,
    circumstances: Option<Arc<Circumstances>>,
    verb: PhantomData<V>,
}

/// A verb as a type, so that a permit for one cannot be used for another.
pub trait PermitVerb {
    /// The verb.
    const VERB: Verb;
}

macro_rules! permit_verbs {
    ($($(#[$doc:meta])* $name:ident => $verb:expr;)*) => {
        $(
            $(#[$doc])*
            pub struct $name;

            impl PermitVerb for $name {
                const VERB: Verb = $verb;
            }
        )*
    };
}

permit_verbs! {
    /// Leave to seal.
    Encrypt => Verb::Encrypt;
    /// Leave to open.
    Decrypt => Verb::Decrypt;
    /// Leave to bring envelopes up to date.
    Rewrap => Verb::Rewrap;
    /// Leave to administer the tenant.
    AdminOf => Verb::Admin;
}

impl<V> Permit<V> {
    /// The tenant that this is leave for.
    pub fn tenant(&self) -> &TenantId {
        &self.tenant
    }

    /// Who was given leave.
    pub fn principal(&self) -> &PrincipalId {
        self.principal.id()
    }

    /// Who it is, for the record of what he does with this leave. Whoever asks takes the recording over.
    pub fn who(&self) -> Who<'_> {
        who(&self.principal, Some(&self.tenant), self.circumstances.as_deref())
    }

    /// This leave, for a call under these circumstances.
    pub fn under(mut self, circumstances: Option<Arc<Circumstances>>) -> Self {
        self.circumstances = circumstances;
        self
    }

    /// The circumstances of the call, where the edge has established any.
    pub fn circumstances(&self) -> Option<&Arc<Circumstances>> {
        self.circumstances.as_ref()
    }

    /// What the configuration adds to the encryption context of the call.
    pub fn service_context(&self) -> &ServiceContext {
        static NONE: LazyLock<ServiceContext> = LazyLock::new(ServiceContext::default);
        self.circumstances.as_ref().map_or_else(|| &*NONE, |circumstances| &circumstances.context)
    }
}

/// Leave to administer the service: it names no tenant, and is no leave to use anybody's keys.
pub struct Operate {
    principal: Arc<Principal>,
    circumstances: Option<Arc<Circumstances>>,
}

impl Operate {
    /// Who was given leave.
    pub fn principal(&self) -> &PrincipalId {
        self.principal.id()
    }

    /// Who it is, for the record of what he does with this leave. Whoever asks takes the recording over.
    pub fn who(&self) -> Who<'_> {
        who(&self.principal, None, self.circumstances.as_deref())
    }

    /// This leave, for a call under these circumstances.
    pub fn under(mut self, circumstances: Option<Arc<Circumstances>>) -> Self {
        self.circumstances = circumstances;
        self
    }

    /// The circumstances of the call, where the edge has established any.
    pub fn circumstances(&self) -> Option<&Arc<Circumstances>> {
        self.circumstances.as_ref()
    }
}

fn who<'a>(
    principal: &'a Principal,
    tenant: Option<&'a TenantId>,
    circumstances: Option<&'a Circumstances>,
) -> Who<'a> {
    match circumstances {
        Some(circumstances) => {
            circumstances.take_over();
            Who { tenant, ..circumstances.who(principal) }
        }
        None => Who { method: principal.attributes().method, ..Who::local(principal.id(), tenant) },
    }
}

impl Principal {
    /// Leave for `V` in the tenant that the request names; where it names none, in the only one that the caller
    /// holds.
    pub fn permit<V: PermitVerb>(self: &Arc<Self>, named: Option<&str>) -> Result<Permit<V>, Forbidden> {
        if !self.may(V::VERB) {
            return Err(Forbidden::Verb(V::VERB));
        }
        let tenant = match (named, self.tenants.as_slice()) {
            (Some(named), held) => {
                held.iter().find(|tenant| tenant.as_str() == named).ok_or(Forbidden::Tenant)?
            }
            (None, [only]) => only,
            (None, []) => return Err(Forbidden::NoTenant),
            (None, _) => return Err(Forbidden::TenantNotNamed),
        };
        Ok(Permit {
            principal: Arc::clone(self),
            tenant: tenant.clone(),
            circumstances: None,
            verb: PhantomData,
        })
    }

    /// Leave to administer this tenant: for who holds it with the verb `admin`, and for who operates the service.
    pub fn permit_admin(self: &Arc<Self>, tenant: &TenantId) -> Result<Permit<AdminOf>, Forbidden> {
        let holds = self.may(Verb::Admin) && self.tenants.contains(tenant);
        if holds || self.may(Verb::Operate) {
            return Ok(Permit {
                principal: Arc::clone(self),
                tenant: tenant.clone(),
                circumstances: None,
                verb: PhantomData,
            });
        }
        Err(if self.may(Verb::Admin) { Forbidden::Tenant } else { Forbidden::Verb(Verb::Admin) })
    }

    /// Leave to administer the service.
    pub fn permit_operate(self: &Arc<Self>) -> Result<Operate, Forbidden> {
        if self.may(Verb::Operate) {
            Ok(Operate { principal: Arc::clone(self), circumstances: None })
        } else {
            Err(Forbidden::Verb(Verb::Operate))
        }
    }

    /// Whether this caller may give an API key these tenants and verbs: an operator may give any, an administrator
    /// only tenants that he holds and never `operate`. Nobody can raise himself by making a key.
    pub fn may_grant(&self, tenants: &[TenantId], verbs: &[Verb]) -> Result<(), Forbidden> {
        if self.may(Verb::Operate) {
            return Ok(());
        }
        if verbs.contains(&Verb::Operate) {
            return Err(Forbidden::Verb(Verb::Operate));
        }
        if tenants.iter().all(|tenant| self.tenants.contains(tenant)) {
            Ok(())
        } else {
            Err(Forbidden::Tenant)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principal(tenants: &[&str], verbs: &[Verb]) -> Arc<Principal> {
        Arc::new(Principal {
            id: "api-key:test".parse().unwrap(),
            tenants: tenants.iter().map(|tenant| tenant.parse().unwrap()).collect(),
            verbs: verbs.to_vec(),
            attributes: crate::access::Attributes::api_key(),
        })
    }

    #[test]
    fn a_verb_that_is_not_granted_is_refused_and_none_implies_another() {
        for held in Verb::ALL {
            let caller = principal(&["acme"], &[held]);
            assert_eq!(caller.permit::<Encrypt>(None).is_ok(), held == Verb::Encrypt);
            assert_eq!(caller.permit::<Decrypt>(None).is_ok(), held == Verb::Decrypt);
            assert_eq!(caller.permit::<Rewrap>(None).is_ok(), held == Verb::Rewrap);
            assert_eq!(caller.permit_operate().is_ok(), held == Verb::Operate);
            let administers = matches!(held, Verb::Admin | Verb::Operate);
            assert_eq!(caller.permit_admin(&"acme".parse().unwrap()).is_ok(), administers);
        }
    }

    #[test]
    fn the_tenant_is_one_that_the_caller_holds_or_the_only_one() {
        let one = principal(&["acme"], &[Verb::Encrypt]);
        assert_eq!(one.permit::<Encrypt>(None).unwrap().tenant().as_str(), "acme");
        assert_eq!(one.permit::<Encrypt>(Some("acme")).unwrap().tenant().as_str(), "acme");
        assert_eq!(one.permit::<Encrypt>(Some("evil")).err(), Some(Forbidden::Tenant));
        assert_eq!(one.permit::<Encrypt>(Some("ACME")).err(), Some(Forbidden::Tenant));
        assert_eq!(one.permit::<Encrypt>(Some("")).err(), Some(Forbidden::Tenant));
        let two = principal(&["acme", "evil"], &[Verb::Encrypt]);
        assert_eq!(two.permit::<Encrypt>(None).err(), Some(Forbidden::TenantNotNamed));
        assert_eq!(two.permit::<Encrypt>(Some("evil")).unwrap().tenant().as_str(), "evil");
        assert_eq!(principal(&[], &[Verb::Encrypt]).permit::<Encrypt>(None).err(), Some(Forbidden::NoTenant));
    }

    #[test]
    fn nobody_can_raise_himself_by_making_a_key() {
        let admin = principal(&["acme"], &[Verb::Admin]);
        let (acme, evil): (TenantId, TenantId) = ("acme".parse().unwrap(), "evil".parse().unwrap());
        assert!(admin.may_grant(std::slice::from_ref(&acme), &[Verb::Encrypt]).is_ok());
        assert_eq!(admin.may_grant(&[acme.clone(), evil.clone()], &[Verb::Encrypt]), Err(Forbidden::Tenant));
        assert_eq!(admin.may_grant(&[acme], &[Verb::Operate]), Err(Forbidden::Verb(Verb::Operate)));
        assert!(principal(&[], &[Verb::Operate]).may_grant(&[evil], &[Verb::Operate]).is_ok());
    }
}
