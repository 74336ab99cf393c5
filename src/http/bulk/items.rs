//! The items of batches and of lines: what one of them asks for, and its answer.

use envelope::text;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::access::{Decrypt, Encrypt, Permit, PermitVerb, Rewrap};
use crate::audit::{PartTally, Tally};
use crate::http::handlers::{Weight, decrypt, encrypt, rewrap};
use crate::http::json::{Base64Plaintext, Context, Encoded, Text, parse};
use crate::http::problem::{Code, Problem};
use crate::http::{HttpState, SharedState};
use crate::operations::{
    Decryption, Decryptor, Encryption, Encryptor, OperationError, Rewrapper, Rewrapping,
};

/// The longest `ref`, in bytes.
const REF_BYTES_MAX: usize = 256;

/// A message to encrypt.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct EncryptItem<'a> {
    /// Comes back with the result: at most 256 bytes.
    #[serde(rename = "ref", default, borrow)]
    #[schema(value_type = Option<String>, example = "row-1", max_length = 256)]
    reference: Option<Text<'a>>,
    /// The bytes to encrypt, in standard base64 with padding.
    #[serde(borrow)]
    #[schema(value_type = String, format = Byte, example = "aGVsbG8=")]
    plaintext: Encoded<'a>,
    /// The encryption context: authenticated, not stored.
    #[serde(default)]
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>, example = json!({"record": "42"}))]
    context: Context,
    /// Under which of the tenant's keys; `default` where nothing is said.
    #[serde(default, borrow)]
    #[schema(value_type = Option<String>, example = "default")]
    key: Option<Text<'a>>,
    /// What the envelope carries; as the key's policy says where nothing is said.
    #[serde(default)]
    envelope: Option<Weight>,
}

/// An envelope to decrypt.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct DecryptItem<'a> {
    /// Comes back with the result: at most 256 bytes.
    #[serde(rename = "ref", default, borrow)]
    #[schema(value_type = Option<String>, example = "row-1", max_length = 256)]
    reference: Option<Text<'a>>,
    /// The envelope in text form.
    #[serde(borrow)]
    #[schema(value_type = String, example = "kf1.S0YBAZrR...")]
    ciphertext: Encoded<'a>,
    /// The encryption context, the same as on encryption.
    #[serde(default)]
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>, example = json!({"record": "42"}))]
    context: Context,
}

/// An envelope to bring up to date.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct RewrapItem<'a> {
    /// Comes back with the result: at most 256 bytes.
    #[serde(rename = "ref", default, borrow)]
    #[schema(value_type = Option<String>, example = "row-1", max_length = 256)]
    reference: Option<Text<'a>>,
    /// The envelope in text form.
    #[serde(borrow)]
    #[schema(value_type = String, example = "kf1.S0YBAZrR...")]
    ciphertext: Encoded<'a>,
    /// The encryption context, the same as on encryption. Not needed with `mode: "wrapped_key"`.
    #[serde(default)]
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>, example = json!({"record": "42"}))]
    context: Context,
    /// How far rewrapping may go; `auto` where nothing is said.
    #[serde(default)]
    mode: rewrap::Mode,
    /// What the envelope is to carry; as the key's policy says where nothing is said.
    #[serde(default)]
    envelope: Option<Weight>,
}

/// What went wrong with one item.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct ItemProblem<'a> {
    /// A URN that names the code.
    #[serde(rename = "type")]
    problem_type: String,
    /// What is wrong, in a few words; the same for every occurrence.
    title: &'a str,
    /// The HTTP status that a single call would have answered with.
    status: u16,
    /// What is wrong this time, and what to do.
    detail: &'a str,
    /// A stable name for programs.
    code: &'a str,
    /// Whether the same item may succeed later.
    retryable: bool,
}

/// A verb that is done to many items: it makes what answers them.
pub(in crate::http) trait ItemVerb: PermitVerb + Sized + Send + Sync + 'static {
    /// Answers items one by one, as long as it is held.
    type Answerer<'a>: Answerer;

    /// For about so many items, which are counted here for the audit.
    fn answerer<'a>(
        state: &'a HttpState,
        permit: &'a Permit<Self>,
        items: usize,
        tally: Option<&Tally>,
    ) -> Self::Answerer<'a>;
}

/// Answers items.
pub(in crate::http) trait Answerer: Send {
    /// Appends the fields of the answer to `out`.
    fn answer(&mut self, item: &[u8], out: &mut Vec<u8>) -> impl Future<Output = Result<(), Problem>> + Send;

    /// What the audit is told of the items.
    fn items(&mut self) -> &mut PartTally;
}

impl ItemVerb for Encrypt {
    type Answerer<'a> = (&'a HttpState, Encryptor<'a>);

    fn answerer<'a>(
        state: &'a HttpState,
        permit: &'a Permit<Self>,
        items: usize,
        tally: Option<&Tally>,
    ) -> Self::Answerer<'a> {
        (state, state.operations.encryptor(permit, items, tally))
    }
}

impl Answerer for (&HttpState, Encryptor<'_>) {
    async fn answer(&mut self, item: &[u8], out: &mut Vec<u8>) -> Result<(), Problem> {
        let (state, encryptor) = self;
        let item: EncryptItem<'_> = parse(item)?;
        write_ref(item.reference.as_ref(), out)?;
        encryptor.items().name(item.reference.as_ref().map(|reference| &*reference.0));
        let key = encrypt::key_name(state, item.key.as_ref())?;
        let plaintext =
            Base64Plaintext { text: &item.plaintext.0, bytes_max: state.options.plaintext_bytes_max };
        let (context, weight) = (item.context.0, item.envelope.map(Into::into));
        let encryption = Encryption { key, context, weight, plaintext: &plaintext };
        encrypt::write(&encryptor.encrypt(encryption).await?, out);
        Ok(())
    }

    fn items(&mut self) -> &mut PartTally {
        self.1.items()
    }
}

impl ItemVerb for Decrypt {
    type Answerer<'a> = Decryptor<'a>;

    fn answerer<'a>(
        state: &'a HttpState,
        permit: &'a Permit<Self>,
        _: usize,
        tally: Option<&Tally>,
    ) -> Self::Answerer<'a> {
        state.operations.decryptor(permit, tally)
    }
}

impl Answerer for Decryptor<'_> {
    async fn answer(&mut self, item: &[u8], out: &mut Vec<u8>) -> Result<(), Problem> {
        let item: DecryptItem<'_> = parse(item)?;
        write_ref(item.reference.as_ref(), out)?;
        Decryptor::items(self).name(item.reference.as_ref().map(|reference| &*reference.0));
        let envelope = text::decode(&item.ciphertext.0).map_err(OperationError::from)?;
        let decrypted = self.decrypt(Decryption { envelope, context: item.context.0 }).await?;
        decrypt::write(&decrypted, out)
    }

    fn items(&mut self) -> &mut PartTally {
        Decryptor::items(self)
    }
}

impl ItemVerb for Rewrap {
    type Answerer<'a> = Rewrapper<'a>;

    fn answerer<'a>(
        state: &'a HttpState,
        permit: &'a Permit<Self>,
        items: usize,
        tally: Option<&Tally>,
    ) -> Self::Answerer<'a> {
        state.operations.rewrapper(permit, items, tally)
    }
}

impl Answerer for Rewrapper<'_> {
    async fn answer(&mut self, item: &[u8], out: &mut Vec<u8>) -> Result<(), Problem> {
        let item: RewrapItem<'_> = parse(item)?;
        write_ref(item.reference.as_ref(), out)?;
        Rewrapper::items(self).name(item.reference.as_ref().map(|reference| &*reference.0));
        let envelope = text::decode(&item.ciphertext.0).map_err(OperationError::from)?;
        let (context, weight) = (item.context.0, item.envelope.map(Into::into));
        let rewrapping = Rewrapping { envelope, context, mode: item.mode.into(), weight };
        rewrap::write(&self.rewrap(rewrapping).await?, out);
        Ok(())
    }

    fn items(&mut self) -> &mut PartTally {
        Rewrapper::items(self)
    }
}

/// The answers to a stretch of items.
pub(super) struct Answers {
    pub(super) json: Vec<u8>,
    pub(super) failed: usize,
}

/// Answers a stretch of items, in order. `Err` in an item stands for one that could not even be read.
pub(super) async fn answer_all<'a, V: ItemVerb>(
    state: &SharedState,
    permit: &Permit<V>,
    tally: Option<&Tally>,
    items: impl ExactSizeIterator<Item = Result<&'a [u8], Problem>>,
    separator: u8,
) -> Answers {
    let mut answerer = V::answerer(state, permit, items.len(), tally);
    let mut answers = Answers { json: Vec::new(), failed: 0 };
    let mut logged = false;
    for item in items {
        let json = &mut answers.json;
        json.push(b'{');
        let start = json.len();
        let tried = answerer.items().tried();
        let outcome = match &item {
            Ok(item) => answerer.answer(item, json).await,
            Err(problem) => Err(problem.clone()),
        };
        if let Err(problem) = outcome {
            // What did not get as far as the operation is counted here.
            if answerer.items().tried() == tried {
                let details = answerer.items().details();
                answerer.items().note(details, Some((problem.code.name(), &problem.detail)));
            }
            json.truncate(start);
            answers.failed += 1;
            // Once for a stretch: an outage would otherwise fill the log.
            if problem.code.status().is_server_error() && !logged {
                logged = true;
                let (code, reason) = (problem.code.name(), problem.internal.as_deref().unwrap_or_default());
                tracing::warn!(code, reason, "item failed");
            }
            write_problem(item.ok(), &problem, &mut answers.json);
        }
        answers.json.extend_from_slice(&[b'}', separator]);
    }
    answers
}

fn write_ref(reference: Option<&Text<'_>>, out: &mut Vec<u8>) -> Result<(), Problem> {
    let Some(reference) = reference else { return Ok(()) };
    if reference.0.len() > REF_BYTES_MAX {
        let told = format!("ref is longer than {REF_BYTES_MAX} bytes");
        return Err(Problem::new(Code::MalformedRequest, told));
    }
    out.extend_from_slice(br#""ref":"#);
    // Writing into memory cannot fail.
    let _ = serde_json::to_writer(&mut *out, &*reference.0);
    out.push(b',');
    Ok(())
}

/// What can be told of an item that may be malformed in any other field.
#[derive(Deserialize)]
struct OnlyRef<'a> {
    #[serde(rename = "ref", default, borrow)]
    reference: Option<Text<'a>>,
}

fn write_problem(item: Option<&[u8]>, problem: &Problem, out: &mut Vec<u8>) {
    if let Some(Ok(item)) = item.map(parse::<OnlyRef<'_>>) {
        let start = out.len();
        if write_ref(item.reference.as_ref(), out).is_err() {
            out.truncate(start);
        }
    }
    out.extend_from_slice(br#""error":"#);
    let _ = serde_json::to_writer(
        &mut *out,
        &ItemProblem {
            problem_type: format!("urn:keyfold:problem:{}", problem.code.name()),
            title: problem.code.title(),
            status: problem.code.status().as_u16(),
            detail: &problem.detail,
            code: problem.code.name(),
            retryable: problem.code.retryable(),
        },
    );
}
