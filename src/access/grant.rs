//! What an authenticated caller may do. One place decides, and [`Permit`] is its only product.

use std::marker::PhantomData;
use std::sync::{Arc, LazyLock};

use envelope::EncryptionContext;

use super::rules::{Scope, Unmet};
use super::{Circumstances, Forbidden, Principal, ServiceContext};
use crate::audit::Who;
use crate::spread::Near;
use crate::tenant::{KeyName, PrincipalId, TenantId, Verb};

/// Leave to do one kind of thing for one tenant. It cannot be made outside this room.
pub struct Permit<V> {
    principal: Near<Principal>,
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

impl<V: PermitVerb> Permit<V> {
    /// Whether the leave goes so far as this key and this context. Every operation asks once it knows both, before
    /// it uses the key.
    pub fn covers(&self, key: &KeyName, context: &EncryptionContext) -> Result<(), Forbidden> {
        self.principal.covers(V::VERB, &self.tenant, key, context)
    }

    /// Whether [`Permit::covers`] has to be asked with the context: whether it goes so far as this key cannot be
    /// said without. An operation that could do without the context then asks for it all the same, and checks that
    /// it is the right one.
    pub fn needs_context(&self, key: &KeyName) -> bool {
        let free = |scope: &Scope| scope.covers_key(key) && scope.context.is_empty();
        let mut held = self.principal.grants.iter().filter(|grant| grant.holds(V::VERB, &self.tenant));
        let mut narrowing = self.principal.restrictions.iter().filter(|r| r.verbs.contains(&V::VERB));
        !(held.any(|grant| free(&grant.role.scope)) && narrowing.all(|narrow| free(&narrow.scope)))
    }
}

impl Permit<AdminOf> {
    /// Whether who was given leave may administer this tenant too.
    pub fn administers(&self, tenant: &TenantId) -> bool {
        self.principal.administers(tenant)
    }
}

/// Leave to administer the service: it names no tenant, and is no leave to use anybody's keys.
pub struct Operate {
    principal: Near<Principal>,
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
    pub fn permit<V: PermitVerb>(self: &Near<Self>, named: Option<&str>) -> Result<Permit<V>, Forbidden> {
        if !self.may(V::VERB) {
            return Err(Forbidden::Verb(V::VERB));
        }
        let tenant = match (named, self.tenants()) {
            (Some(named), held) => {
                let mut held = held.iter().chain(&self.named_tenants);
                held.find(|tenant| tenant.as_str() == named).ok_or(Forbidden::Tenant)?
            }
            // What other tenants' administrators grant changes nothing of what a call without the header means: it
            // can neither be drawn into their tenant, nor be stopped by it.
            (None, [only]) => only,
            (None, []) if self.named_tenants.is_empty() => return Err(Forbidden::NoTenant),
            (None, _) => return Err(Forbidden::TenantNotNamed),
        };
        if !self.holds(V::VERB, tenant) {
            return Err(Forbidden::Verb(V::VERB));
        }
        Ok(Permit {
            principal: Near::clone(self),
            tenant: tenant.clone(),
            circumstances: None,
            verb: PhantomData,
        })
    }

    fn administers(&self, tenant: &TenantId) -> bool {
        self.holds(Verb::Admin, tenant) || self.may(Verb::Operate)
    }

    /// Leave to administer this tenant: for who holds it with the verb `admin`, and for who operates the service.
    pub fn permit_admin(self: &Near<Self>, tenant: &TenantId) -> Result<Permit<AdminOf>, Forbidden> {
        self.may_administer(tenant)?;
        Ok(Permit {
            principal: Near::clone(self),
            tenant: tenant.clone(),
            circumstances: None,
            verb: PhantomData,
        })
    }

    fn may_administer(&self, tenant: &TenantId) -> Result<(), Forbidden> {
        if self.administers(tenant) {
            return Ok(());
        }
        // One who administers another tenant is not told whether this one exists.
        Err(if self.may(Verb::Admin) { Forbidden::Tenant } else { Forbidden::Verb(Verb::Admin) })
    }

    /// Leave to administer the service.
    pub fn permit_operate(self: &Near<Self>) -> Result<Operate, Forbidden> {
        self.may_operate()?;
        Ok(Operate { principal: Near::clone(self), circumstances: None })
    }

    fn may_operate(&self) -> Result<(), Forbidden> {
        if self.may(Verb::Operate) { Ok(()) } else { Err(Forbidden::Verb(Verb::Operate)) }
    }

    /// Whether this caller may give an API key these tenants and verbs: an operator may give any, an administrator
    /// only tenants that he administers and never `operate`. Nobody can raise himself by making a key.
    pub fn may_grant(&self, tenants: &[TenantId], verbs: &[Verb]) -> Result<(), Forbidden> {
        if self.may(Verb::Operate) {
            return Ok(());
        }
        if verbs.contains(&Verb::Operate) {
            return Err(Forbidden::Verb(Verb::Operate));
        }
        if tenants.iter().all(|tenant| self.holds(Verb::Admin, tenant)) {
            Ok(())
        } else {
            Err(Forbidden::Tenant)
        }
    }

    /// The decision about a call, once all of it is known: a grant covers it, and every restriction that applies.
    fn covers(
        &self,
        verb: Verb,
        tenant: &TenantId,
        key: &KeyName,
        context: &EncryptionContext,
    ) -> Result<(), Forbidden> {
        let mut lacking = None;
        let granted = self.grants.iter().filter(|grant| grant.holds(verb, tenant)).any(|grant| {
            let unmet = grant.role.scope.unmet(key, context);
            let covered = unmet.is_none();
            // Of two grants that do not cover, the one that is for this key says more.
            if lacking.is_none() || unmet.as_ref().is_some_and(|unmet| *unmet != Unmet::Key) {
                lacking = unmet;
            }
            covered
        });
        let mut narrowed = self.restrictions.iter().filter(|restriction| restriction.verbs.contains(&verb));
        let unmet = if granted {
            narrowed.find_map(|restriction| restriction.scope.unmet(key, context))
        } else {
            Some(lacking.unwrap_or(Unmet::Key))
        };
        match unmet {
            None => Ok(()),
            Some(Unmet::Key) => Err(Forbidden::Key(verb)),
            Some(Unmet::Context(_)) => Err(Forbidden::Context(verb)),
        }
    }

    /// Whether a call would be allowed, and why: a line for each thing that speaks for or against it.
    pub fn explain(
        &self,
        verb: Verb,
        tenant: &TenantId,
        key: &KeyName,
        context: &EncryptionContext,
    ) -> Explanation {
        let mut reasons = Vec::new();
        for grant in &self.grants {
            let says = if !grant.role.verbs.contains(&verb) {
                format!("does not grant '{verb}'")
            } else if !grant.tenants.contains(tenant) && verb != Verb::Operate {
                format!("is not for the tenant '{tenant}'")
            } else {
                grant.role.scope.unmet(key, context).map_or_else(
                    || "covers this call".to_owned(),
                    |unmet| describe(&unmet, &grant.role.scope, key),
                )
            };
            reasons.push(format!("{} {says}", grant.role.name));
        }
        if self.grants.is_empty() {
            reasons.push("nothing grants this principal anything".to_owned());
        }
        for restriction in self.restrictions.iter().filter(|r| r.verbs.contains(&verb)) {
            let unmet = restriction.scope.unmet(key, context);
            let says = unmet
                .map_or_else(|| "allows it".to_owned(), |unmet| describe(&unmet, &restriction.scope, key));
            reasons.push(format!("{} {says}", restriction.name));
        }
        let outcome = match verb {
            Verb::Operate => self.may_operate(),
            Verb::Admin => self.may_administer(tenant),
            _ if !self.holds(verb, tenant) => {
                Err(if self.may(verb) { Forbidden::Tenant } else { Forbidden::Verb(verb) })
            }
            _ => self.covers(verb, tenant, key, context),
        };
        Explanation { outcome, reasons }
    }
}

/// Why a call would be allowed or refused.
#[derive(Debug)]
pub struct Explanation {
    /// The decision.
    pub outcome: Result<(), Forbidden>,
    /// What speaks for and against it.
    pub reasons: Vec<String>,
}

fn describe(unmet: &Unmet, scope: &Scope, key: &KeyName) -> String {
    match unmet {
        Unmet::Key => {
            let keys: Vec<String> = scope.keys.iter().flatten().map(ToString::to_string).collect();
            format!("is for the keys {} and not for '{key}'", keys.join(", "))
        }
        Unmet::Context(name) => {
            let condition = scope.context.iter().find(|condition| condition.name == *name);
            let values: Vec<String> =
                condition.iter().flat_map(|condition| &condition.values).map(ToString::to_string).collect();
            format!("asks for the context pair {name:?} with one of the values {}", values.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Attributes;
    use crate::access::rules::{Grant, Role};
    use crate::spread::Spread;

    fn principal(tenants: &[&str], verbs: &[Verb]) -> Near<Principal> {
        let grant = Grant {
            tenants: tenants.iter().map(|tenant| tenant.parse().unwrap()).collect(),
            role: Role::unlimited("test", verbs.to_vec()),
        };
        let id = "api-key:test".parse().unwrap();
        Spread::new(Principal::new(id, vec![grant], vec![], vec![], Attributes::api_key())).near()
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
