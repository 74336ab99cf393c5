//! Request metadata into the encryption context: what the configuration takes from the credential, from headers, the
//! route and the tenant is worked out here, once for each call, between authentication and the handler.
//!
//! The result is a [`Circumstances`], which goes with the caller and then with the permit into the operation. A name has
//! one source, so that nothing a client sends can stand in for what a credential says.

use std::borrow::Cow;
use std::sync::Arc;

use envelope::EncryptionContext;
use http::{HeaderMap, HeaderName};
use serde::Deserialize;

use super::edge::Arrival;
use crate::access::{Circumstances, Principal, ServiceContext};
use crate::http::problem::{Code, Problem};
use crate::tenant::TenantId;

/// What the route's context value is: every data-plane route of this version of the interface has the same, or what
/// one verb sealed another could not open.
const ROUTE: &str = "/v1";
const NAME_BYTES_MAX: usize = 128;
const PATTERN_BYTES_MAX: usize = 1_024;
/// How much memory a compiled pattern may take.
const PATTERN_PROGRAM_BYTES_MAX: usize = 256 * 1024;
/// The most pairs that the configuration may add: half of what a context holds.
const RULES_MAX: usize = 32;

/// Where a pair's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Subject,
    Issuer,
    San,
    Claim(Box<str>),
    Header(HeaderName),
    Route,
    Tenant,
}

/// To what a pair is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Bind {
    Message,
    Key,
}

/// One `[[context]]` entry as it is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContextEntry {
    source: String,
    name: String,
    bind: Bind,
    #[serde(default = "yes")]
    required: bool,
    #[serde(default)]
    allowed: Vec<String>,
    pattern: Option<String>,
    #[serde(default = "value_bytes_max")]
    value_bytes_max: usize,
}

fn yes() -> bool {
    true
}

fn value_bytes_max() -> usize {
    256
}

#[derive(Debug)]
struct Rule {
    origin: Origin,
    name: Box<str>,
    bind: Bind,
    required: bool,
    allowed: Vec<String>,
    pattern: Option<regex::Regex>,
    value_bytes_max: usize,
}

/// What the configuration adds to every encryption context. Read from the `[[context]]` entries, and valid ever
/// after. Cloning is cheap.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "Vec<ContextEntry>")]
pub struct ContextRules {
    rules: Arc<[Rule]>,
    names: Option<Arc<[Box<str>]>>,
}

impl TryFrom<Vec<ContextEntry>> for ContextRules {
    type Error = String;

    fn try_from(entries: Vec<ContextEntry>) -> Result<Self, String> {
        if entries.len() > RULES_MAX {
            return Err(format!("there are {} [[context]] entries: use at most {RULES_MAX}", entries.len()));
        }
        let mut rules: Vec<Rule> = Vec::with_capacity(entries.len());
        for entry in entries {
            let rule = Rule::try_from(entry)?;
            if rules.iter().any(|other| other.name == rule.name) {
                return Err(format!(
                    "the context name {:?} has two sources: which of them counts is what an attacker would choose, so \
                     give each name one",
                    rule.name
                ));
            }
            rules.push(rule);
        }
        let names = (!rules.is_empty()).then(|| rules.iter().map(|rule| rule.name.clone()).collect());
        Ok(Self { rules: rules.into(), names })
    }
}

impl TryFrom<ContextEntry> for Rule {
    type Error = String;

    fn try_from(entry: ContextEntry) -> Result<Self, String> {
        let ContextEntry { source, name, bind, required, allowed, pattern, value_bytes_max } = entry;
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(format!(
                "the context name {name:?}: use 1 to {NAME_BYTES_MAX} bytes, none a control"
            ));
        }
        if EncryptionContext::is_reserved(&name) {
            return Err(format!("the context name {name:?} is reserved: use one without keyfold: or aws"));
        }
        if !(1..=4_096).contains(&value_bytes_max) {
            return Err(format!("value_bytes_max of {name:?} is {value_bytes_max}: use 1 to 4096"));
        }
        let pattern = pattern.map(|text| compile(&text, &name)).transpose()?;
        Ok(Self {
            origin: parse_origin(&source)?,
            name: name.into(),
            bind,
            required,
            allowed,
            pattern,
            value_bytes_max,
        })
    }
}

/// The whole value has to match, whether the pattern says so or not.
fn compile(text: &str, name: &str) -> Result<regex::Regex, String> {
    if text.len() > PATTERN_BYTES_MAX {
        return Err(format!("the pattern of {name:?} is longer than {PATTERN_BYTES_MAX} bytes"));
    }
    // By itself first: `a)|(b` would close the group that holds the whole.
    let alone = regex::RegexBuilder::new(text).size_limit(PATTERN_PROGRAM_BYTES_MAX).build();
    let whole = alone.and_then(|_| {
        regex::RegexBuilder::new(&format!(r"\A(?:{text})\z")).size_limit(PATTERN_PROGRAM_BYTES_MAX).build()
    });
    whole.map_err(|error| format!("the pattern of {name:?} is not valid: {error}"))
}

fn parse_origin(source: &str) -> Result<Origin, String> {
    match source {
        "credential.subject" => return Ok(Origin::Subject),
        "credential.issuer" => return Ok(Origin::Issuer),
        "credential.san" => return Ok(Origin::San),
        "route" => return Ok(Origin::Route),
        "tenant" => return Ok(Origin::Tenant),
        _ => {}
    }
    if let Some(claim) = source.strip_prefix("credential.claim.").filter(|claim| !claim.is_empty()) {
        return Ok(Origin::Claim(claim.into()));
    }
    if let Some(header) = source.strip_prefix("header.") {
        let header = HeaderName::try_from(header)
            .map_err(|_| format!("the context source {source:?} does not name a header"))?;
        return match header.as_str() {
            "authorization" | "cookie" | "proxy-authorization" => Err(format!(
                "the context source {source:?} holds a secret, which does not belong into a context"
            )),
            "x-request-id" | "traceparent" | "tracestate" | "date" | "user-agent" | "content-length"
            | "forwarded" | "x-forwarded-for" => Err(format!(
                "the context source {source:?} differs from call to call: what is sealed with it would not open again"
            )),
            _ => Ok(Origin::Header(header)),
        };
    }
    Err(format!(
        "the context source {source:?} is not known: use credential.subject, credential.issuer, credential.san, \
         credential.claim.NAME, header.NAME, route or tenant"
    ))
}

impl ContextRules {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// What a call with this credential and these headers adds to its context. What depends on the tenant is added
    /// by [`ContextRules::for_tenant`].
    fn resolve(&self, principal: &Principal, headers: &HeaderMap) -> Result<ServiceContext, Problem> {
        let (message, bound) = (EncryptionContext::new(), EncryptionContext::new());
        let mut context = ServiceContext { names: self.names.clone(), message, bound };
        for rule in self.rules.iter().filter(|rule| rule.origin != Origin::Tenant) {
            match rule.value(principal, headers)? {
                Some(value) => rule.bind_to(&mut context, &value)?,
                None if rule.required => return Err(rule.missing()),
                None => {}
            }
        }
        Ok(context)
    }

    /// The same call when its tenant is known; none where that adds nothing.
    pub(in crate::http) fn for_tenant(
        &self,
        circumstances: &Arc<Circumstances>,
        tenant: &TenantId,
    ) -> Result<Option<Circumstances>, Problem> {
        let mut context = None;
        for rule in self.rules.iter().filter(|rule| rule.origin == Origin::Tenant) {
            let context = context.get_or_insert_with(|| circumstances.context.clone());
            rule.bind_to(context, tenant.as_str())?;
        }
        Ok(context.map(|context| circumstances.with_context(context)))
    }
}

impl Rule {
    fn value<'a>(
        &self,
        principal: &'a Principal,
        headers: &'a HeaderMap,
    ) -> Result<Option<Cow<'a, str>>, Problem> {
        let attributes = principal.attributes();
        let value = match &self.origin {
            Origin::Subject => {
                Some(Cow::Borrowed(attributes.subject.as_deref().unwrap_or(principal.id().as_str())))
            }
            Origin::Issuer => attributes.issuer.as_deref().map(Cow::Borrowed),
            Origin::San => attributes.san.as_deref().map(Cow::Borrowed),
            Origin::Claim(name) => attributes.claim(name),
            Origin::Route => Some(Cow::Borrowed(ROUTE)),
            Origin::Header(name) => one_header(headers, name)?.map(Cow::Borrowed),
            Origin::Tenant => None,
        };
        Ok(value.filter(|value| !value.is_empty()))
    }

    fn bind_to(&self, context: &mut ServiceContext, value: &str) -> Result<(), Problem> {
        let fits = value.len() <= self.value_bytes_max
            && !value.chars().any(char::is_control)
            && (self.allowed.is_empty() || self.allowed.iter().any(|allowed| allowed == value))
            && self.pattern.as_ref().is_none_or(|pattern| pattern.is_match(value));
        if !fits {
            return Err(self.refuse("has a value that the configuration does not allow"));
        }
        context.insert(&self.name, value, self.bind == Bind::Key).map_err(|error| {
            Problem::new(Code::MalformedRequest, format!("the context is not valid: {error}"))
        })
    }

    fn missing(&self) -> Problem {
        self.refuse("is missing, and the configuration requires it")
    }

    /// A header is the caller's to put right; what a credential says is not.
    fn refuse(&self, what: &str) -> Problem {
        let name = &self.name;
        match &self.origin {
            Origin::Header(header) => {
                Problem::new(Code::MalformedRequest, format!("the header {header} (context {name:?}) {what}"))
            }
            _ => Problem::new(
                Code::Forbidden,
                format!("what the context {name:?} takes from the credential {what}"),
            ),
        }
    }
}

/// The one value of a header. Twice is refused: two proxies, or a client and a proxy, would disagree on which counts.
fn one_header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::new(Code::MalformedRequest, format!("send one {name} header")));
    }
    let text = std::str::from_utf8(value.as_bytes()).map(str::trim);
    text.map(Some)
        .map_err(|_| Problem::new(Code::MalformedRequest, format!("the {name} header is not UTF-8 text")))
}

/// The circumstances of a call, for its permit and its record, and whether the configuration allows it.
pub(super) fn circumstances(
    rules: &ContextRules,
    principal: &Principal,
    headers: &HeaderMap,
    arrival: &Arrival,
) -> (Arc<Circumstances>, Result<(), Problem>) {
    let (id, source) = (arrival.id, arrival.source);
    match rules.resolve(principal, headers) {
        Ok(context) => (Arc::new(Circumstances::new(id, source, context)), Ok(())),
        Err(problem) => (Arc::new(Circumstances::new(id, source, ServiceContext::default())), Err(problem)),
    }
}
