//! Grants of the registry: what administrators have given principals in their tenants while the service runs.
//!
//! All of them are in memory, and read again when the registry says that something has changed; a principal is made
//! anew from them then. What the registry holds is parsed here as strictly as the configuration is: a grant that does
//! not parse grants nothing.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use super::rules::{Condition, Grant, Pattern, Role, Scope};
use crate::clock::Clock;
use crate::store::watch::{ChangeWatch, Mark};
use crate::store::{GrantRecord, GrantScope, GrantStore, StoreError};
use crate::tenant::{PrincipalId, TenantId, Verb};

/// How many grants are read from the registry at a time.
const PAGE: u32 = 1_000;
/// The most patterns of keys in a grant, conditions on the context, and values of a condition.
const PARTS_MAX: usize = 64;
/// The longest of their texts, in bytes.
const TEXT_BYTES_MAX: usize = 1_024;

/// All grants of the registry, as they were at some moment.
#[derive(Debug, Default)]
pub struct Book {
    grants: Vec<(Pattern, Grant)>,
}

impl Book {
    /// Of these records. One that cannot be understood is left out, and said in the log.
    pub fn new(records: &[GrantRecord]) -> Self {
        let parsed = records.iter().filter_map(|record| match parse(record) {
            Ok(grant) => Some(grant),
            Err(reason) => {
                tracing::error!(grant = record.id, reason, "a grant in the registry grants nothing");
                None
            }
        });
        Self { grants: parsed.collect() }
    }

    /// What this principal holds by them.
    pub(super) fn of(&self, principal: &PrincipalId) -> impl Iterator<Item = &Grant> {
        let of_him = self.grants.iter().filter(|(pattern, _)| pattern.matches(principal.as_str()));
        of_him.map(|(_, grant)| grant)
    }
}

/// Checks a grant before it is stored: what is wrong with it is said to who makes it.
pub fn check_grant(principal: &str, verbs: &[Verb], scope: &GrantScope) -> Result<(), String> {
    parse_parts("", principal, verbs, scope, vec![]).map(|_| ())
}

fn parse(record: &GrantRecord) -> Result<(Pattern, Grant), String> {
    let tenants: Vec<TenantId> = vec![record.tenant.clone()];
    parse_parts(&record.id, &record.principal, &record.verbs, &record.scope, tenants)
}

fn parse_parts(
    id: &str,
    principal: &str,
    verbs: &[Verb],
    scope: &GrantScope,
    tenants: Vec<TenantId>,
) -> Result<(Pattern, Grant), String> {
    let principal: PrincipalId = principal.parse().map_err(|error| format!("{error}"))?;
    let pattern = Pattern::parse(principal.as_str()).map_err(|error| format!("principal: {error}"))?;
    let known = ["api-key:", "jwt:", "cert:"];
    if !known.iter().any(|kind| pattern.text().starts_with(kind)) {
        return Err("a principal begins with api-key:, jwt: or cert:, such as jwt:corp:alice".to_owned());
    }
    if verbs.is_empty() {
        return Err("a grant without verbs grants nothing: name at least one".to_owned());
    }
    if verbs.contains(&Verb::Operate) {
        return Err("operate is not of a tenant: give it to an API key, or by the configuration".to_owned());
    }
    if verbs.contains(&Verb::Admin) && (scope.keys.is_some() || !scope.context.is_empty()) {
        return Err("admin cannot be limited to keys or contexts: grant it alone".to_owned());
    }
    let scope = parse_scope(scope)?;
    let role = Role { name: format!("the grant {id} of the registry"), verbs: verbs.to_vec(), scope };
    Ok((pattern, Grant { tenants, role: Arc::new(role) }))
}

fn parse_scope(scope: &GrantScope) -> Result<Scope, String> {
    let keys = scope.keys.as_ref().map(|keys| patterns("keys", keys)).transpose()?;
    if scope.context.len() > PARTS_MAX {
        return Err(format!("context: name at most {PARTS_MAX} pairs"));
    }
    let condition = |condition: &crate::store::GrantCondition| {
        let name = condition.name.clone();
        if name.is_empty() || name.len() > TEXT_BYTES_MAX {
            return Err(format!("context: a name has 1 to {TEXT_BYTES_MAX} bytes"));
        }
        Ok(Condition { name, values: patterns("context", &condition.values)? })
    };
    let context = scope.context.iter().map(condition).collect::<Result<_, _>>()?;
    Ok(Scope { keys, context })
}

fn patterns(what: &str, texts: &[String]) -> Result<Vec<Pattern>, String> {
    if texts.is_empty() || texts.len() > PARTS_MAX {
        return Err(format!("{what}: name 1 to {PARTS_MAX}, or leave it out for all"));
    }
    let parse = |text: &String| {
        if text.len() > TEXT_BYTES_MAX {
            return Err(format!("{what}: a text has at most {TEXT_BYTES_MAX} bytes"));
        }
        Pattern::parse(text).map_err(|error| format!("{what}: {error}"))
    };
    texts.iter().map(parse).collect()
}

/// The grants as they were read last.
#[derive(Default)]
pub(super) struct Present {
    /// None where they were never read.
    mark: Option<u64>,
    pub(super) book: Arc<Book>,
}

/// The grants of the registry as they are now.
pub(super) struct Granted {
    store: Arc<dyn GrantStore>,
    watch: Arc<ChangeWatch>,
    clock: Clock,
    mark: Arc<Mark>,
    present: ArcSwap<Present>,
    /// Of many callers who find the book out of date, one reads it again.
    reading: tokio::sync::Mutex<()>,
}

impl Granted {
    pub(super) fn new(store: Arc<dyn GrantStore>, watch: Arc<ChangeWatch>, clock: Clock) -> Self {
        let mark = watch.mark(None);
        Self {
            store,
            watch,
            clock,
            mark,
            present: ArcSwap::default(),
            reading: tokio::sync::Mutex::default(),
        }
    }

    /// The book now. It is the same value for as long as nothing has changed. Fails where the registry has not answered
    /// recently enough: who has a book that he asked for just now may use what else is in memory (API keys do).
    pub(super) async fn now(&self) -> Result<Guard<Arc<Present>>, StoreError> {
        if let Some(present) = self.current() {
            return Ok(present);
        }
        let _turn = self.reading.lock().await;
        self.watch.ensure_current().await?;
        if let Some(present) = self.current() {
            return Ok(present);
        }
        // Before the records that it vouches for.
        let mark = Some(self.mark.now());
        let book = Arc::new(Book::new(&self.read().await?));
        self.present.store(Arc::new(Present { mark, book }));
        Ok(self.present.load())
    }

    fn current(&self) -> Option<Guard<Arc<Present>>> {
        let present = self.present.load();
        let read = present.mark == Some(self.mark.now());
        (read && self.watch.is_current(self.clock.monotonic())).then_some(present)
    }

    async fn read(&self) -> Result<Vec<GrantRecord>, StoreError> {
        let mut all: Vec<GrantRecord> = Vec::new();
        loop {
            let after = all.last().map(|grant| grant.id.clone());
            let page = self.store.grants(None, after.as_deref(), PAGE).await?;
            if page.is_empty() {
                return Ok(all);
            }
            all.extend(page);
        }
    }
}
